"""Work recorded once on a device and replayed at once, on the same memory: on NVIDIA GPUs, CUDA graphs.

A recording holds addresses: it reads its inputs' memory as it is when replayed and writes the same outputs again. Whoever replays
it keeps the inputs alive and puts new values where the old ones were.
"""

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch

from engines.errors import EngineError, EngineMemoryError

__all__ = ["CannotRecord", "CudaRecorder", "Recorder", "Recording", "current_recording", "on_stream", "without_collection"]

Outputs = TypeVar("Outputs")


class CannotRecord(Exception):
    """Some work cannot be recorded; it can still be done as it comes."""


class Recording(Generic[Outputs]):
    """Recorded work. ``replay`` computes its ``outputs`` anew, in the same memory."""

    outputs: Outputs
    replay: Callable[[], None]


_CURRENT: ContextVar[Recording[Any] | None] = ContextVar("recording", default=None)


def current_recording() -> Recording[Any] | None:
    """The recording that is being made here; None where work is done as it comes.

    Runners whose state a recording would refer to keep it apart for each, and only as long as the recording lives.
    """
    return _CURRENT.get()


class Recorder(ABC):
    """Makes recordings that take turns and share memory: a replay of one may write over what others have made.

    What is to outlive that is copied, as the last part of the recorded work, to memory from before the recording.
    """

    @abstractmethod
    def on_stream(self) -> AbstractContextManager[None]:
        """Inside it, work goes to the recorder's own stream, in its turn (see ``on_stream``)."""

    @abstractmethod
    def _capture(self, work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """Record the work without doing it: what replays it, and its outputs."""

    def record(self, work: Callable[[], Outputs]) -> Recording[Outputs]:
        """Do the work once, so that all that is made at first use is there, and record it. Call it inside ``on_stream``.

        Raises:
            CannotRecord: the work can be done, but not recorded.
            torch.OutOfMemoryError, EngineMemoryError: there is no memory for it now.
        """
        recording: Recording[Outputs] = Recording()
        token = _CURRENT.set(recording)
        try:
            work()
            try:
                recording.replay, recording.outputs = self._capture(work)
            except (torch.OutOfMemoryError, EngineMemoryError):
                raise
            except (RuntimeError, EngineError) as error:
                raise CannotRecord(" ".join(str(error).split())) from error
        finally:
            _CURRENT.reset(token)
        return recording

    def hand_over(self) -> None:  # noqa: B027 - where work is done at once it is over
        """What the last caller of ``on_stream`` has put on its stream since, another caller's replay comes after."""

    def wait(self) -> None:  # noqa: B027 - where replays are done at once there is nothing to wait for
        """Wait until no replay is under way: what one reads and writes may be freed then."""

    def forget(self) -> None:  # noqa: B027 - most have nothing to forget
        """All recordings have been freed; called before there is another."""


class CudaRecorder(Recorder):
    """Records CUDA graphs, on a stream of their own.

    All share one pool of memory, so that they need as much as the largest of them and not their sum. What one graph has made in
    the pool survives another only if they are replayed in the order of their capture, for the memory that the first freed within
    itself is the next one's to write to. The order of steps is the plan's, so what is to last has to lie elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._caller: torch.cuda.Stream | None = None

    def on_stream(self) -> AbstractContextManager[None]:
        """Inside it, work goes to the recorder's own stream, in its turn (see ``on_stream``)."""
        self._caller = torch.cuda.current_stream(self._stream.device)
        return on_stream(self._stream)

    def hand_over(self) -> None:
        """The recorder's own stream waits for the last caller's, which may still read what was replayed.

        For that one and not the current one: a call that was dropped is let go by whatever thread collects it.
        """
        if self._caller is not None:
            self._stream.wait_stream(self._caller)
            self._caller = None

    def wait(self) -> None:
        """Wait for the recorder's own stream, on which all replays run."""
        self._stream.synchronize()

    def forget(self) -> None:
        """Give the next recordings another pool: PyTorch does not reuse one without graphs while memory of it is still in use."""
        self._pool = torch.cuda.graph_pool_handle()

    def _capture(self, work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(self._stream.device)
        try:
            # Other threads may allocate and wait meanwhile: only what this one does has to be fit for a graph.
            with (
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
                without_collection(),
            ):
                outputs = work()
        finally:
            torch.cuda.set_stream(before)  # PyTorch leaves its own where a capture fails
        return graph.replay, outputs


@contextmanager
def without_collection() -> Iterator[None]:
    """Inside it, Python collects no garbage: what it frees might belong to CUDA, and to free that ends a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Inside it, work goes to ``stream``: after all that the current stream was given, and before what it gets next.

    The host waits for neither. Memory freed on one of the two streams may be given to the other's work at once.
    """
    current = torch.cuda.current_stream(stream.device)
    if current == stream:
        yield
        return
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        current.wait_stream(stream)
