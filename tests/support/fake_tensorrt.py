"""A fake of the ``tensorrt`` module's runtime interface, and of as much of its builder as a timing cache takes.

An "engine file" names a program: a torch function with typed, bounded inputs. Its context reads the inputs from memory by
address and writes the outputs to memory by address, as a GPU would, so that a wrong address, shape or dtype shows as a wrong
number. It is as strict as the real thing: bad shapes and addresses that are misaligned or the host's are refused and logged, a
context used by two threads at once fails, and so does one that has no memory to work in, that is recorded before it ran with the
same shapes, that is told shapes while it is recorded or changed after it was, or whose runtime configuration or cache is gone
before it. Tests run it in ``device_memory``.

With ``watch_flights`` launches are under way until somebody waits for an event behind them, and a context that goes meanwhile is
noted. They are computed at once all the same: a queue of them would not have PyTorch's own operations in it, which
on the CPU are done at once and would read what is not there yet. Memory may go while a launch that uses it is under way: PyTorch
gives it to later work on the same stream only.
"""

import contextlib
import ctypes
import json
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from functools import cache
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engines.tensorrt.workspace import StreamWorkspace
from tests.support.device_memory import ALIGNMENT, is_device
from tests.support.recording import outside, tape


class DataType(Enum):
    FLOAT = torch.float32
    HALF = torch.float16
    INT64 = torch.int64


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


class EngineInvalidityDiagnostics(IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    OLD_CUDA_RUNTIME = 8
    INSUFFICIENT_GPU_MEMORY = 16
    MALFORMED_ENGINE = 32
    CUDA_ERROR = 64


@dataclass(frozen=True)
class Program:
    """What a fake engine file holds. ``limits`` are the smallest and largest shape of each input."""

    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    limits: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    outputs: tuple[str, ...]
    types: dict[str, DataType] = field(default_factory=dict)
    card: str = "sm89"
    memory: int = 4096
    """Bytes to work in."""
    capturable: bool = True
    channels_last: frozenset[str] = frozenset()
    """Tensors whose channels lie together."""

    def type_of(self, name: str) -> DataType:
        return self.types.get(name, DataType.FLOAT)


class FakeTensorRT:
    """Stands for the module: ``files`` maps the content of an engine file to its program; ``card`` is the GPU at hand."""

    __version__ = "11.0.0"
    ILogger = ILogger
    EngineInvalidityDiagnostics = EngineInvalidityDiagnostics
    ComputeCapability = SimpleNamespace(__members__={"CURRENT": 0, "SM86": 1, "SM89": 2})
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
    CudaGraphStrategy = SimpleNamespace(DISABLED="disabled")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    BuilderFlag = SimpleNamespace(TF32="tf32", REQUIRE_USER_ALLOCATION="user allocation")

    def __init__(self, files: dict[bytes, Program], card: str = "sm89") -> None:
        self.files = files
        self.card = card
        self.engines: list[FakeEngine] = []
        self.compiled: list[str] = []
        """The kernels that had to be compiled: those that were in no runtime cache."""
        self.measured: list[str] = []
        """The networks whose kernels had to be measured while they were built: those that were in no timing cache."""
        self.builds = True
        """Whether the builder can build."""
        self.segfaults: list[str] = []
        """What a GPU would have ended the process for, or worse: what went before a context that needed it, memory that went
        before a launch that reads or writes it."""
        self.trouble = 0
        """What is wrong with the machine, of EngineInvalidityDiagnostics: no engine can be loaded."""
        self.flights: set[Flight] | None = None
        """What is under way; None where nobody asks."""

    def watch_flights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on what is launched is under way until it is waited for, and only runners hold engines and contexts."""
        self.flights = flights = set[Flight]()

        class Event:
            """Behind all that has been launched so far."""

            def __init__(self) -> None:
                self.behind = set(flights)

            def synchronize(self) -> None:
                flights.difference_update(self.behind)

        monkeypatch.setattr(StreamWorkspace, "mark", lambda workspace: Event() if tape() is None else None)

    def Runtime(self, logger: Any) -> "FakeRuntime":
        return FakeRuntime(self, logger)

    def Builder(self, logger: Any) -> "FakeBuilder":
        return FakeBuilder(self)

    def OnnxParser(self, network: "FakeNetwork", logger: Any) -> "FakeParser":
        return FakeParser(network)


class Flight:
    """One launch."""


class FakeNetwork:
    """What a builder knows of a network: the file that it was parsed from."""

    num_inputs = num_outputs = 0
    name = ""


class FakeParser:
    def __init__(self, network: FakeNetwork) -> None:
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        self.network.name = Path(path).stem
        return True


class FakeBuilder:
    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt = trt

    def create_network(self, flags: int) -> FakeNetwork:
        assert flags == 2, "strongly typed"
        return FakeNetwork()

    def create_builder_config(self) -> "FakeBuilderConfig":
        return FakeBuilderConfig(self.trt.card)

    def create_optimization_profile(self) -> object:
        return object()

    def build_serialized_network(self, network: FakeNetwork, config: "FakeBuilderConfig") -> bytes | None:
        if not self.trt.builds:
            return None
        known = config.cache.kernels if config.cache else []
        if network.name not in known:
            self.trt.measured.append(network.name)
            known.append(network.name)
        return network.name.encode()


class FakeBuilderConfig:
    num_compute_capabilities = 1

    def __init__(self, card: str) -> None:
        self.card = card
        self.cache: FakeTimingCache | None = None

    def clear_flag(self, flag: str) -> None: ...

    def set_flag(self, flag: str) -> None: ...

    def add_optimization_profile(self, profile: object) -> int:
        return 0

    def set_compute_capability(self, capability: int, index: int) -> bool:
        return True

    def create_timing_cache(self, data: bytes) -> "FakeTimingCache":
        """As the real one does, it takes what it cannot read for an empty cache."""
        cache = FakeTimingCache(self.card)
        if data:
            with contextlib.suppress(ValueError):
                cache.card, *cache.kernels = json.loads(data)
        return cache

    def set_timing_cache(self, cache: "FakeTimingCache", ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.card != self.card:
            return False
        self.cache = cache
        return True


class FakeRuntime:
    def __init__(self, trt: FakeTensorRT, logger: ILogger) -> None:
        self.trt = trt
        self.logger = logger

    def deserialize_cuda_engine(self, data: bytes) -> "FakeEngine | None":
        program = self.trt.files.get(data)
        if program is None or program.card != self.trt.card or self.trt.trouble:
            self.logger.log(ILogger.WARNING, "a warning, which is no reason")
            self.logger.log(ILogger.ERROR, "deserializeCudaEngine:\n  incompatible device")
            return None
        engine = FakeEngine(self.trt, data.decode(), program, self.logger)
        if self.trt.flights is None:
            self.trt.engines.append(engine)
        return engine

    def get_engine_validity(self, data: bytes) -> tuple[int, int]:
        if self.trt.trouble:
            return 2, self.trt.trouble
        program = self.trt.files.get(data)
        if program is None:
            return 2, int(EngineInvalidityDiagnostics.MALFORMED_ENGINE)
        return 2, int(EngineInvalidityDiagnostics.UNSUPPORTED_CC) if program.card != self.trt.card else 0


class FakeEngine:
    def __init__(self, trt: FakeTensorRT, name: str, program: Program, logger: ILogger) -> None:
        self.trt, self.name = trt, name
        self.program = program
        self.logger = logger
        self.names = [*program.limits, *program.outputs]
        self.contexts: list[FakeContext] = []
        self.memory_left = True
        self.output_shapes = cache(self._output_shapes)

    def _output_shapes(self, shapes: tuple[tuple[int, ...], ...]) -> dict[str, tuple[int, ...]]:
        program = self.program
        kinds = [program.type_of(name).value for name in program.limits]
        with outside(), torch.no_grad():
            zeros = [torch.zeros(shape, dtype=kind) for shape, kind in zip(shapes, kinds, strict=True)]
            results = _as_tuple(program.function(*zeros))
        return {name: tuple(result.shape) for name, result in zip(program.outputs, results, strict=True)}

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.program.type_of(name)

    def get_tensor_format(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="HWC8" if name in self.program.channels_last else "LINEAR")

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert profile == 0
        smallest, largest = self.program.limits[name]
        return [smallest, smallest, largest]

    @property
    def device_memory_size_v2(self) -> int:
        return self.program.memory

    def create_runtime_config(self) -> "FakeConfig":
        return FakeConfig(self.trt.card)

    def create_execution_context(self, config: Any = None) -> "FakeContext | None":
        if not self.memory_left:
            self.logger.log(ILogger.ERROR, "out of memory")
            return None
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.01)  # the real thing compiles kernels here: time enough for another thread to come by
        strategy = config.strategy if isinstance(config, FakeConfig) else config
        assert strategy == "user managed"
        context = FakeContext(self, config)
        if isinstance(config, FakeConfig):
            for needed in (config, config.cache):
                weakref.finalize(needed, _must_be_last, weakref.ref(context), self.trt.segfaults)
        if self.trt.flights is None:
            self.contexts.append(context)
        return context

    def compute(self, place: int, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        program = self.program
        last = program.channels_last
        sizes = {name: prod(shape) * program.type_of(name).value.itemsize for name, shape in shapes.items()}
        read = [is_device(addresses[name], size) for name, size in sizes.items()]
        if not (is_device(place, program.memory) and all(read)):
            self.trt.segfaults.append(f"{self.name} is run with memory that is gone")
            return
        arguments = [_read(addresses[key], shapes[key], program.type_of(key), key in last) for key in program.limits]
        ctypes.memset(place, 0xFF, program.memory)
        with outside(), torch.no_grad():
            results = _as_tuple(program.function(*arguments))
        for name, result in zip(program.outputs, results, strict=True):
            assert is_device(addresses[name], result.nbytes), "an output is written where there is no memory"
            _write(addresses[name], result.permute(0, 2, 3, 1) if name in last else result)


class FakeConfig:
    """TensorRT-RTX's runtime configuration."""

    def __init__(self, card: str) -> None:
        self.card = card
        self.strategy = "static"
        self.cuda_graph_strategy = "unset"
        self.dynamic_shapes_kernel_specialization_strategy = "lazy"
        self.cache: FakeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> "FakeCache":
        return FakeCache(self.card)

    def set_runtime_cache(self, cache: "FakeCache") -> bool:
        self.cache = cache
        return True


class FakeCache:
    """Names of compiled kernels, for one card."""

    def __init__(self, card: str) -> None:
        self.card = card
        self.kernels: list[str] = []

    def serialize(self) -> memoryview:
        return memoryview(json.dumps([self.card, *self.kernels]).encode())

    def deserialize(self, blob: bytes) -> bool:
        try:
            card, *kernels = json.loads(blob)
        except ValueError:
            return False
        if card == self.card:
            self.kernels = kernels
        return bool(card == self.card)


class FakeTimingCache(FakeCache):
    """Names of networks whose kernels were measured, on one card."""

    def combine(self, other: "FakeTimingCache", ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if other.card == self.card:
            self.kernels += [name for name in other.kernels if name not in self.kernels]
        return other.card == self.card


class FakeContext:
    def __init__(self, engine: FakeEngine, config: Any) -> None:
        self.engine = engine
        self._config = weakref.ref(config) if isinstance(config, FakeConfig) else lambda: config
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.launches: list[int] = []
        self.memory: tuple[int, int] | None = None
        self.known: set[str] = set()
        self.shapings = 0
        """How often it was told a shape."""
        self.recorded = False
        self.in_graph: dict[str, int] = {}
        """Addresses of the recorded launch."""
        self.fails = False
        self.user: int | None = None
        self.flights: set[Flight] = set()
        if engine.trt.flights is not None:
            weakref.finalize(self, _must_have_landed, self.flights, engine.trt)

    @property
    def config(self) -> Any:
        """What it was made with; as the real thing, it does not hold on to it."""
        return self._config()

    def _enter(self) -> None:
        """From its first binding to its launch, a context belongs to one thread."""
        user = self.user
        if user is None:
            self.user = threading.get_ident()
        elif user != threading.get_ident():
            raise RuntimeError("two threads bind one context")

    def _refuse(self, message: str) -> bool:
        self.engine.logger.log(ILogger.ERROR, message)
        return False

    def set_device_memory(self, address: int, size: int) -> None:
        assert not self.recorded, "the address is in a graph"
        assert size >= self.engine.program.memory
        assert address % ALIGNMENT == 0
        assert is_device(address, size), "the host's memory"
        self.memory = address, size

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.program.capturable

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._enter()
        if self.recorded:
            return self._refuse("the context is in a graph")
        if tape() is not None:
            return self._refuse("a shape is set while a graph is recorded")
        self.shapings += 1
        smallest, largest = self.engine.program.limits[name]
        if any(not low <= got <= high for low, got, high in zip(smallest, shape, largest, strict=True)):
            return self._refuse(f"{name}: {shape} is outside the profile")
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._enter()
        if not address or address % ALIGNMENT:
            return self._refuse(f"{name}: address {address} is not aligned")
        if not is_device(address):
            return self._refuse(f"{name}: address {address} is not the device's")
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.engine.output_shapes(tuple(self.shapes[key] for key in self.engine.program.limits))[name]

    def execute_async_v3(self, stream: int) -> bool:
        self._enter()
        if self.fails:
            return self._refuse("the launch failed")
        if self.memory is None:
            return self._refuse("no device memory")
        kernels = f"{self.engine.name} {sorted(self.shapes.items())}"
        recording = tape()
        if recording is None:
            self._compile(kernels)
            self.engine.compute(self.memory[0], self.addresses, dict(self.shapes))
        elif kernels not in self.known:
            return self._refuse("the shapes are new, and a graph is being recorded")
        else:
            engine, place, addresses, shapes = self.engine, self.memory[0], dict(self.addresses), dict(self.shapes)
            recording.launches.append(lambda: engine.compute(place, addresses, shapes))  # a graph does not hold on to contexts
            self.recorded, self.in_graph = True, addresses
        if recording is None and self.engine.trt.flights is not None:
            flight = Flight()
            self.flights.add(flight)
            self.engine.trt.flights.add(flight)
        self.launches.append(stream)
        # A launch uses the addresses of its own run only: what stays behind would hide a missing one in the next run.
        self.addresses.clear()
        self.user = None
        return True

    def _compile(self, kernels: str) -> None:
        self.known.add(kernels)
        cache = self.config.cache if isinstance(self.config, FakeConfig) else None
        if cache is None or kernels not in cache.kernels:
            self.engine.trt.compiled.append(kernels)
            if cache is not None:
                cache.kernels.append(kernels)


def _must_be_last(context: "weakref.ref[FakeContext]", segfaults: list[str]) -> None:
    if context() is not None:
        segfaults.append("a configuration or cache is gone before its context")


def _must_have_landed(flights: set[Flight], trt: FakeTensorRT) -> None:
    if flights & (trt.flights or set()):
        trt.segfaults.append("a context is gone while a launch of it is under way")


def _as_tuple(result: torch.Tensor | Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def _read(address: int, shape: tuple[int, ...], kind: DataType, channels_last: bool = False) -> torch.Tensor:
    if channels_last:
        n, c, h, w = shape
        return _read(address, (n, h, w, c), kind).permute(0, 3, 1, 2)
    size = prod(shape) * torch.empty(0, dtype=kind.value).element_size()
    return torch.frombuffer(bytearray(ctypes.string_at(address, size)), dtype=kind.value).reshape(shape)


def _write(address: int, tensor: torch.Tensor) -> None:
    tensor = tensor.contiguous()
    ctypes.memmove(address, tensor.data_ptr(), tensor.numel() * tensor.element_size())
