"""The runner of TensorRT engines: how an execution context is given addresses."""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn
from weakref import WeakKeyDictionary

import torch

from engines.base import DTYPES, Runner
from engines.bundle.manifest import Feature, Segment
from engines.cuda.graphs import CannotRecord, current_recording
from engines.errors import EngineError, NeedsBuildError
from engines.tensorrt.diagnostics import refusal
from engines.tensorrt.error_log import ErrorLog
from engines.tensorrt.workspace import StreamWorkspace

__all__ = ["EngineRunner"]

_DATA_TYPES = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64"}


@dataclass(eq=False)
class _Context:
    """An execution context, and the lock that must be held from its first binding to its launch.

    It does not go before its last launch has been done: the host waits. For replays of a recording that it belongs to, whoever
    lets the recording go does.
    """

    handle: Any
    needs: Any = None
    """Objects that must outlive the handle. Fields are freed in their order."""
    scratch: torch.Tensor | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The input shapes that it is set to; a context keeps them."""
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The shapes that it writes then."""
    launched: set[tuple[tuple[int, ...], ...]] = field(default_factory=set)
    """The input shapes that it has run with."""
    launch: torch.cuda.Event | None = None
    """Behind the last launch."""

    def __del__(self) -> None:
        if self.launch is not None:
            with suppress(Exception):  # at the end of the process CUDA may be gone
                self.launch.synchronize()


class EngineRunner(Runner):
    """Runs one deserialised engine on the current CUDA stream, without waiting for it.

    Inputs are read from, and outputs written to, the tensors' own memory. An engine cannot run twice at once on one execution
    context, so there is one per stream, and one more for each recording: a context that has served a CUDA graph must not change.
    All of a stream work in one block of scratch memory.

    Args:
        segment: the segment.
        features: the manifest's features.
        loaded: the TensorRT runtime and the engine that it made; kept together, for the engine needs the runtime.
        create_context: makes an execution context of the engine, without memory to work in, or None where it cannot; and what
            must outlive it.
        log: where the engine's errors arrive.
        engine_name: the name that errors use.
        device: where it runs.
        up_to_date: whether a build would keep the engine as it is.
        learned: called when the engine has run with shapes that are new to it, and may have compiled kernels for them.

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
        create_context: Callable[[Any], tuple[Any, Any]],
        log: ErrorLog,
        engine_name: str,
        device: StreamWorkspace,
        up_to_date: bool = False,
        learned: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(segment, features)
        self.device = device.device
        self._runtime, self._engine = loaded
        self._create_context, self._learned, self._up_to_date = create_context, learned, up_to_date
        self._log = log
        self._engine_name = engine_name
        self._workspace = device
        self._workspace.scratch.reserve(self._engine.device_memory_size_v2)
        self._contexts: dict[int, _Context] = {}
        self._recorded: WeakKeyDictionary[object, dict[int, _Context]] = WeakKeyDictionary()
        self._growing = threading.Lock()
        self._known: set[tuple[tuple[int, ...], ...]] = set()
        """The input shapes that some context has run with."""
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._check_tensors(names)
        self._formats = {name: _memory_format(self._engine.get_tensor_format(name)) for name in names}
        # An input that nothing reads may be gone from the engine.
        self._taken = [name for name in segment.inputs if name in names]
        self._limits = {name: [tuple(dims) for dims in self._engine.get_tensor_profile_shape(name, 0)] for name in self._taken}

    def _check_tensors(self, names: Sequence[str]) -> None:
        """Memory has no type: a wrong one would be read as it is, so it is refused when the engine is loaded."""
        for name in (*self.segment.inputs, *self.segment.outputs):
            if name in names:
                got, expected = self._engine.get_tensor_dtype(name).name, _DATA_TYPES[self.features[name].dtype]
                if got != expected:
                    self._refuse_engine(f"its engine has {name} as {got}, the manifest as {expected}")
            elif name in self.segment.outputs:
                self._refuse_engine(f"its engine has no output {name}, only {', '.join(names)}")

    def _run_impl(self, inputs: dict[str, torch.Tensor], sizes: dict[str, int]) -> dict[str, torch.Tensor]:
        with self._workspace.stream() as stream:
            taken = {name: self._addressable(inputs[name], self._formats[name]) for name in self._taken}
            self._check_limits(taken)
            context = self._context(stream)
            with self._log.collect() as errors, context.lock:
                outputs = self._bind(context, taken, stream, errors)
                self._expect(context.handle.execute_async_v3(stream), "launch", errors)
                context.launch = self._workspace.mark() or context.launch
                self._note_shapes(context, taken, stream)
        # Copies in ``taken`` may go now: PyTorch gives their memory only to later work on the same stream.
        return outputs

    def _bind(
        self, context: _Context, taken: Mapping[str, torch.Tensor], stream: int, errors: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Give the context its inputs, its scratch memory and new outputs, which are returned."""
        handle = context.handle
        if current_recording() is None:
            self._give_scratch(context, stream)
        for name, tensor in taken.items():
            self._set_shape(context, name, tuple(tensor.shape), errors)
            self._set_address(handle, name, tensor, errors)
        outputs = self._make_outputs(context)
        for name, tensor in outputs.items():
            self._set_address(handle, name, tensor, errors)
        return outputs

    def _set_shape(self, context: _Context, name: str, shape: tuple[int, ...], errors: Sequence[str]) -> None:
        """Only where it is new: a context that is told one computes anew what depends on it, which no recording may hold."""
        if context.shapes.get(name) == shape:
            return
        context.outputs.clear()
        self._expect(context.handle.set_input_shape(name, shape), f"shape {_text(shape)} of {name}", errors)
        context.shapes[name] = shape

    def _note_shapes(self, context: _Context, taken: Mapping[str, torch.Tensor], stream: int) -> None:
        """At the first launch with some shapes, what was compiled for them is kept, and a recording learns whether it can be."""
        shapes = tuple(tuple(tensor.shape) for tensor in taken.values())
        if shapes in context.launched:
            return
        context.launched.add(shapes)
        if shapes not in self._known:  # what another context has compiled is in their cache already
            self._known.add(shapes)
            self._learned()
        fit = getattr(context.handle, "is_stream_capturable", None)  # only TensorRT-RTX can tell
        if current_recording() is not None and fit is not None and not fit(stream):
            raise CannotRecord(f"segment {self.segment.name}: {self._engine_name} cannot run it inside a CUDA graph")

    def _addressable(self, tensor: torch.Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
        tensor = tensor.contiguous(memory_format=memory_format)
        return tensor.clone() if tensor.data_ptr() % self.ALIGNMENT else tensor

    def _make_outputs(self, context: _Context) -> dict[str, torch.Tensor]:
        """Empty outputs, of the shapes that the engine will write."""
        if not context.outputs:
            context.outputs |= {name: tuple(context.handle.get_tensor_shape(name)) for name in self.segment.outputs}
        return {
            name: torch.empty(
                shape, dtype=DTYPES[self.features[name].dtype], device=self.device, memory_format=self._formats[name]
            )
            for name, shape in context.outputs.items()
        }

    def _set_address(self, handle: Any, name: str, tensor: torch.Tensor, errors: Sequence[str]) -> None:
        self._expect(handle.set_tensor_address(name, tensor.data_ptr()), f"address of {name}", errors)

    def _check_limits(self, taken: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in taken.items():
            smallest, _, largest = self._limits[name]
            if not all(low <= got <= high for low, got, high in zip(smallest, tensor.shape, largest, strict=True)):
                built = f"{_text(smallest)} to {_text(largest)}" if smallest != largest else f"{_text(smallest)} only"
                self._refuse(
                    f"input {name} is {_text(tensor.shape)}, its engine was built for {built}; "
                    "choose a size and batch that it takes, or build it with other --sizes and --batch"
                )

    def _expect(self, done: bool, what: str, errors: Sequence[str]) -> None:
        if not done:
            self._refuse(f"{self._engine_name} refused the {what}: {errors[0] if errors else 'it gives no reason'}")

    def _refuse(self, reason: str) -> NoReturn:
        raise EngineError(f"segment {self.segment.name}: {reason}")

    def _refuse_engine(self, reason: str) -> NoReturn:
        raise NeedsBuildError(f"segment {self.segment.name}: {reason}", up_to_date=self._up_to_date)

    def _context(self, stream: int) -> _Context:
        """The context of a stream, or of the recording that is being made; made when it is first asked for."""
        recording = current_recording()
        with self._growing:
            contexts = self._contexts if recording is None else self._recorded.setdefault(recording, {})
            if stream not in contexts:
                with self._log.collect() as errors:
                    handle, needs = self._create_context(self._engine)
                if handle is None:
                    self._refuse_context(errors)
                contexts[stream] = _Context(handle, needs)
                self._give_scratch(contexts[stream], stream)
            return contexts[stream]

    def _refuse_context(self, errors: Sequence[str]) -> NoReturn:
        """An engine can be read here and yet not run: its kernels are finished when a context is made."""
        reason = errors[0] if errors else "it gives no reason"
        message = f"segment {self.segment.name}: {self._engine_name} refused the making of an execution context: {reason}"
        raise refusal(message, errors, up_to_date=self._up_to_date)

    def _give_scratch(self, context: _Context, stream: int) -> None:
        block = self._workspace.scratch.block(stream)
        if context.scratch is not block:
            context.handle.set_device_memory(block.data_ptr(), block.numel())
            context.scratch = block


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _memory_format(tensor_format: Any) -> torch.memory_format:
    """How a tensor of that TensorRT format lies in memory; the engines built here have no others."""
    return torch.channels_last if tensor_format.name == "HWC8" else torch.contiguous_format
