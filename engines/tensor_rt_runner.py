"""The runner of TensorRT engines, and the log that their errors are read from."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, NoReturn

import torch

from engines.base import DTYPES, Runner
from engines.errors import EngineError
from engines.manifest import Feature, Segment

__all__ = ["EngineRunner", "ErrorLog"]

_DATA_TYPES = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64"}


class ErrorLog:
    """What a TensorRT module logs as an error; everything milder is dropped."""

    def __init__(self, trt: Any) -> None:
        self.logger = _logger(trt)

    @contextmanager
    def collect(self) -> Iterator[list[str]]:
        """The errors logged until the block ends, one line each, from whatever thread."""
        collected: list[str] = []
        self.logger.listeners[id(collected)] = collected
        try:
            yield collected
        finally:
            del self.logger.listeners[id(collected)]


@cache
def _logger(trt: Any) -> Any:
    """The one logger of a module: the library keeps hold of the first that it is given, so it must live for ever."""
    wanted = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

    def start(self: Any) -> None:
        trt.ILogger.__init__(self)
        self.listeners = {}

    def log(self: Any, severity: Any, message: str) -> None:
        if severity in wanted:
            for listener in list(self.listeners.values()):
                listener.append(" ".join(message.split()))

    # Made by hand, because the base class is only known when the module is.
    make: Callable[[], Any] = type("Logger", (trt.ILogger,), {"__init__": start, "log": log})
    return make()


@dataclass
class _Context:
    """An execution context, and the lock that must be held from its first binding to its launch."""

    handle: Any
    lock: threading.Lock = field(default_factory=threading.Lock)


class EngineRunner(Runner):
    """Runs a deserialised engine on PyTorch's current stream, reading and writing the tensors' own memory.

    A context has scratch memory that a launch uses until it has finished, and its bindings are not thread-safe. So
    there is one context per stream, where launches follow one another anyway, and a lock around binding and launching.

    Args:
        loaded: the runtime, which must outlive the engine, and the engine.
        create_context: makes an execution context of the engine; None where there is no memory for one.
        log: where the engine's errors arrive.
        engine_name: the name that errors use.
        device: where tensors live; CPU in tests only.

    Raises:
        EngineError: the engine's tensors are not those of the manifest.
    """

    ALIGNMENT: ClassVar[int] = 256
    """Bytes; TensorRT demands it of every address. PyTorch's allocations have it, views into them may not."""

    def __init__(
        self,
        segment: Segment,
        features: Mapping[str, Feature],
        loaded: tuple[Any, Any],
        create_context: Callable[[Any], Any],
        log: ErrorLog,
        engine_name: str,
        device: torch.device,
    ) -> None:
        super().__init__(segment, features)
        self.device = device
        self._runtime, self._engine = loaded
        self._create_context = create_context
        self._log = log
        self._engine_name = engine_name
        self._contexts: dict[int, _Context] = {}
        self._growing = threading.Lock()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._check_tensors(names)
        # An input that nothing reads may be gone from the engine.
        self._taken = [name for name in segment.inputs if name in names]
        self._limits = {name: [tuple(dims) for dims in self._engine.get_tensor_profile_shape(name, 0)] for name in self._taken}

    def _check_tensors(self, names: Sequence[str]) -> None:
        """Memory has no type: a wrong one would be read as it is, so it is refused when the engine is loaded."""
        for name in (*self.segment.inputs, *self.segment.outputs):
            if name in names:
                got, expected = self._engine.get_tensor_dtype(name).name, _DATA_TYPES[self.features[name].dtype]
                if got != expected:
                    self._refuse(f"its engine has {name} as {got}, the manifest as {expected}; build the bundle again")
            elif name in self.segment.outputs:
                self._refuse(f"its engine has no output {name}, only {', '.join(names)}; build the bundle again")

    def _run_impl(self, inputs: dict[str, torch.Tensor], sizes: dict[str, int]) -> dict[str, torch.Tensor]:
        taken = {name: self._addressable(inputs[name]) for name in self._taken}
        self._check_limits(taken)
        stream = self._stream()
        context = self._context(stream)
        with self._log.collect() as errors, context.lock:
            for name, tensor in taken.items():
                done = context.handle.set_input_shape(name, tuple(tensor.shape))
                self._expect(done, f"shape {_text(tensor.shape)} of {name}", errors)
                self._set_address(context.handle, name, tensor, errors)
            outputs = self._make_outputs(context.handle)
            for name, tensor in outputs.items():
                self._set_address(context.handle, name, tensor, errors)
            self._expect(context.handle.execute_async_v3(stream), "launch", errors)
        # Copies in ``taken`` may go now: PyTorch gives their memory only to later work on the same stream.
        return outputs

    def _addressable(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        return tensor.clone() if tensor.data_ptr() % self.ALIGNMENT else tensor

    def _make_outputs(self, handle: Any) -> dict[str, torch.Tensor]:
        """Empty outputs, of the shapes that the engine will write."""
        return {
            name: torch.empty(tuple(handle.get_tensor_shape(name)), dtype=DTYPES[self.features[name].dtype], device=self.device)
            for name in self.segment.outputs
        }

    def _set_address(self, handle: Any, name: str, tensor: torch.Tensor, errors: Sequence[str]) -> None:
        self._expect(handle.set_tensor_address(name, tensor.data_ptr()), f"address of {name}", errors)

    def _check_limits(self, taken: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in taken.items():
            smallest, _, largest = self._limits[name]
            if not all(low <= got <= high for low, got, high in zip(smallest, tensor.shape, largest, strict=True)):
                self._refuse(
                    f"input {name} is {_text(tensor.shape)}, its engine was built for {_text(smallest)} to "
                    f"{_text(largest)}; choose a size and batch in between, or build it with other --sizes and --batch"
                )

    def _expect(self, done: bool, what: str, errors: Sequence[str]) -> None:
        if not done:
            self._refuse(f"{self._engine_name} refused the {what}: {errors[0] if errors else 'it gives no reason'}")

    def _refuse(self, reason: str) -> NoReturn:
        raise EngineError(f"segment {self.segment.name}: {reason}")

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self.device).cuda_stream) if self.device.type == "cuda" else 0

    def _context(self, stream: int) -> _Context:
        with self._growing:
            if stream not in self._contexts:
                with self._log.collect() as errors:
                    handle = self._create_context(self._engine)
                self._expect(handle is not None, "making of an execution context", errors)
                self._contexts[stream] = _Context(handle)
            return self._contexts[stream]

    def synchronize(self) -> None:
        """Wait until the current stream has finished."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
