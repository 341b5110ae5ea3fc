"""The log of a TensorRT module, collected: errors for our own messages, everything for the list of kernels."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

__all__ = ["ErrorLog"]


class ErrorLog:
    """Collects what a TensorRT module logs: its errors, or everything where that is asked for."""

    def __init__(self, trt: Any) -> None:
        self.logger = _logger(trt)

    def collect(self) -> AbstractContextManager[list[str]]:
        """The errors logged until the block ends, one line each, from whatever thread."""
        return self._listen(self.logger.listeners)

    def collect_all(self) -> AbstractContextManager[list[str]]:
        """Every message logged until the block ends, as it comes: with detailed profiling, the kernels of an engine."""
        return self._listen(self.logger.verbose)

    @contextmanager
    def _listen(self, listeners: dict[int, list[str]]) -> Iterator[list[str]]:
        collected: list[str] = []
        listeners[id(collected)] = collected
        try:
            yield collected
        finally:
            del listeners[id(collected)]


@cache
def _logger(trt: Any) -> Any:
    """The one logger of a module: the library keeps hold of the first that it is given, so it must live for ever."""
    wanted = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

    def start(self: Any) -> None:
        trt.ILogger.__init__(self)
        self.listeners, self.verbose = {}, {}

    def log(self: Any, severity: Any, message: str) -> None:
        for listener in list(self.verbose.values()):
            listener.append(message)
        if severity in wanted:
            for listener in list(self.listeners.values()):
                listener.append(" ".join(message.split()))

    # Made by hand, because the base class is only known when the module is.
    make: Callable[[], Any] = type("Logger", (trt.ILogger,), {"__init__": start, "log": log})
    return make()
