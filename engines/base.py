"""The interface of an engine: a loader (bundle and segment in, runner out) and, for most, a compiler (ONNX in, files out).

The currency between runners is ``torch.Tensor`` on the engine's device: what one runner returns is what the next one
reads and what the cache keeps, without a copy.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch

from engines.bundle.folder import Bundle
from engines.bundle.manifest import Feature, Segment, VaePrecision
from engines.bundle.shapes import bind, resolve
from engines.cuda.graphs import Recorder
from engines.errors import EngineError, NeedsBuildError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["DTYPES", "Engine", "Profile", "Runner", "Traced"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "int64": torch.int64}


_Signature = tuple[tuple[torch.dtype, torch.device, torch.Size], ...]
"""Dtype, device and shape of each input of a segment."""
_MOST_SIGNATURES = 64
"""Of how many kinds of inputs a runner remembers that they fit."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Traced:
    """A traced segment: its ONNX file, and the exported program it came from, for engines that want it."""

    segment: Segment
    onnx: Path
    program: "ExportedProgram | None" = None


@dataclass(frozen=True)
class Profile:
    """Input shapes an engine must take: the smallest, the one to optimise for, the largest, by input name."""

    minimum: Mapping[str, tuple[int, ...]]
    optimum: Mapping[str, tuple[int, ...]]
    maximum: Mapping[str, tuple[int, ...]]


class Runner(ABC):
    """One loaded segment. ``run`` checks, ``_run_impl`` only computes (Polygraphy's ``BaseRunner`` has this split).

    A runner keeps no state between calls that a caller can see, so threads may share it.
    """

    device: torch.device = torch.device("cpu")
    """Where inputs must be and outputs are."""

    def __init__(self, segment: Segment, features: Mapping[str, Feature]) -> None:
        self.segment = segment
        self.features = features
        self._sizes: dict[_Signature, dict[str, int]] = {}
        """What each kind of inputs that was checked tells."""
        self._shapes: dict[tuple[tuple[str, int], ...], dict[str, tuple[int, ...]]] = {}

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Compute the segment's outputs, by feature name, from its inputs, by feature name.

        Raises:
            EngineError: an input is missing, or its dtype, shape or device is not what the manifest and the engine say.
        """
        try:
            chosen = {name: inputs[name] for name in self.segment.inputs}
            signature = tuple([(tensor.dtype, tensor.device, tensor.shape) for tensor in chosen.values()])
            sizes = self._sizes[signature]
        except KeyError:
            sizes = self._check(inputs)
            _remember(self._sizes, signature, sizes)
        return self._run_impl(chosen, sizes.copy())

    def _check(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """The sizes that inputs tell; EngineError where they do not fit."""
        sizes: dict[str, int] = {}
        for name in self.segment.inputs:
            feature = self.features[name]
            tensor = inputs.get(name)
            if tensor is None:
                raise EngineError(f"segment {self.segment.name} needs input {name}; got {', '.join(inputs) or 'nothing'}")
            if tensor.dtype != DTYPES[feature.dtype]:
                raise EngineError(f"segment {self.segment.name}, input {name}: got {tensor.dtype}, expected {feature.dtype}")
            if tensor.device.type != self.device.type:
                raise EngineError(
                    f"segment {self.segment.name}, input {name}: got a tensor on {tensor.device}, "
                    f"expected {self.device}; move it with tensor.to({str(self.device)!r})"
                )
            misfit = bind(feature.shape, tensor.shape, sizes)
            if misfit:
                raise EngineError(f"segment {self.segment.name}, input {name}: {misfit}")
        return sizes

    @abstractmethod
    def _run_impl(self, inputs: dict[str, torch.Tensor], sizes: dict[str, int]) -> dict[str, torch.Tensor]: ...

    def output_shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The outputs' integer shapes, by feature name, for the sizes that the inputs told.

        Raises:
            EngineError: a size does not divide as an output needs, or no input tells it.
        """
        key = tuple(sizes.items())
        shapes = self._shapes.get(key)
        if shapes is None:
            shapes = self._resolve(sizes)
            _remember(self._shapes, key, shapes)
        return shapes

    def _resolve(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        try:
            return {name: resolve(self.features[name].shape, sizes) for name in self.segment.outputs}
        except ValueError as error:
            raise EngineError(f"segment {self.segment.name}: {error}; choose a picture size that divides") from error
        except KeyError as error:
            raise EngineError(f"segment {self.segment.name}: no input tells size {error}, which an output needs") from error

    def _checked(self, outputs: dict[str, torch.Tensor], sizes: dict[str, int]) -> dict[str, torch.Tensor]:
        """The outputs that the segment's file made; raises NeedsBuildError unless they fit the manifest."""
        for name, tensor in outputs.items():
            feature = self.features[name]
            if tensor.dtype != DTYPES[feature.dtype]:
                raise NeedsBuildError(f"segment {self.segment.name} made {name} of {tensor.dtype}, expected {feature.dtype}")
            if misfit := bind(feature.shape, tensor.shape, sizes):
                raise NeedsBuildError(f"segment {self.segment.name} made {name} of a wrong shape: {misfit}")
        return outputs

    def synchronize(self) -> None:
        """Wait until the work of ``run`` on the current stream has finished; nothing to do on a CPU."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def timed_run(self, inputs: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float]:
        """``run``, and the seconds it took until its outputs were there."""
        self.synchronize()
        started = time.perf_counter()
        outputs = self.run(inputs)
        self.synchronize()
        return outputs, time.perf_counter() - started


def _remember(known: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    """Add to what is known, which is forgotten whole where it has grown to ``_MOST_SIGNATURES``."""
    if len(known) >= _MOST_SIGNATURES:
        known.clear()
    known[key] = value


class Engine(ABC):
    """A way to compile and run segments. Making one imports its packages; EngineError where they are missing."""

    name: ClassVar[str]
    compiles: ClassVar[bool]
    """Whether a build makes files for this engine beside the ONNX segments."""
    wants_program: ClassVar[bool] = False
    """Whether ``compile`` reads the exported program and not the ONNX file."""
    has_profile: ClassVar[bool] = False
    """Whether compiled segments only take the sizes and batches they were built for."""

    has_bfloat16: ClassVar[bool] = True
    """Whether segments may compute in bfloat16."""

    computes_in: ClassVar[VaePrecision | None] = None
    """The precision that the engine computes every segment in; None where it is the one that a segment was built in."""

    targets_allowed: ClassVar[tuple[str, ...]] = ()
    """The compute capabilities a user may name for ``compile``, such as ``sm89``; empty where there is no choice."""

    device: torch.device = torch.device("cpu")

    @abstractmethod
    def version(self) -> str:
        """The version of the program behind the engine."""

    def check_targets(self, targets: Sequence[str]) -> tuple[str, ...]:
        """The targets that ``compile`` will build for when asked for these; call it before work starts.

        Raises:
            EngineError: a target is unknown, the engine takes none, or it cannot compile on this machine.
        """
        if targets:
            raise EngineError(f"engine {self.name} takes no targets, got {', '.join(targets)}; leave --targets out")
        return ()

    def compile(
        self, traced: Traced, stem: Path, profile: Profile, targets: Sequence[str], cache_dir: Path | None = None
    ) -> list[Path]:
        """Write the compiled files of a segment, named ``stem`` with a suffix; returns them.

        In the folder ``cache_dir`` an engine may keep what makes other builds shorter.

        Raises:
            EngineError: the engine refuses the segment, or a target it does not know.
        """
        raise NotImplementedError(f"engine {self.name} compiles nothing")

    @abstractmethod
    def load(self, bundle: Bundle, segment: Segment) -> Runner:
        """Load one segment of a bundle.

        Raises:
            EngineError: the bundle has no files of this engine for the segment, or they cannot run here.
            BundleError: the files are damaged.
        """

    def check_device(self) -> None:  # noqa: B027 - most run everywhere
        """Raise EngineError unless this machine has what the engine runs on; to be called before anything else of it is used."""

    def flush(self) -> None:  # noqa: B027 - most learn nothing
        """Write down what runs have compiled, for the next start to find; called at the end of every call."""

    @contextmanager
    def flushing(self, *, at_end: bool = True) -> Iterator[None]:
        """``flush`` at the end of the block, and where it raises: that error goes on, whatever becomes of the flush.

        Args:
            at_end: whether it is to be done where nothing is raised.
        """
        try:
            yield
        except BaseException:  # an interrupt, too: the process may end
            with suppress(Exception):
                self.flush()
            raise
        if at_end:
            self.flush()

    def scratch_bytes(self) -> int:
        """Device memory that the runners loaded so far will take beside their weights when they run; 0 where nobody can tell."""
        return 0

    def recorder(self) -> Recorder | None:
        """The recorder for work of this engine's runners on its device; None where work cannot be recorded, as on a CPU."""
        return None

    def compiled_files(self, bundle: Bundle, segment: Segment) -> list[Path]:
        """The checked paths of what ``compile`` made; NeedsBuildError if the bundle was built without this engine."""
        compiled = segment.engines.get(self.name)
        if compiled is None:
            have = ", ".join(segment.engines) or "none"
            raise NeedsBuildError(f"bundle {bundle.folder} has no {self.name} engines (it has: {have})")
        return [bundle.path(file) for file in compiled.files]
