"""The torch engine, reference and fallback: a segment's traced program, its operators run one by one as they were traced."""

import io
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from zipfile import ZipFile

import torch
from torch import nn

from engines.base import Engine, Profile, Runner, Traced
from engines.bundle.folder import Bundle
from engines.bundle.manifest import Feature, Segment
from engines.cuda.gpu import missing_gpu
from engines.cuda.graphs import CudaRecorder, Recorder
from engines.cuda.tf32 import without_tf32
from engines.errors import EngineError, EngineMemoryError, NeedsBuildError
from engines.program import ProgramError, first_line
from engines.pt2 import read_program, without_pickles

__all__ = ["ModuleRunner", "Torch"]


class ModuleRunner(Runner):
    """A live module as a runner: takes the segment's inputs and returns its outputs in the order of the manifest.

    Gradients are off. ``torch.inference_mode`` is not used: what it makes may not be changed in place outside it, and
    these tensors go on to schedulers and callbacks that are not ours. Autocast is off. With ``no_tf32`` a GPU computes float32 in
    full precision. With ``channels_last`` features of four dimensions come to the module channels last.
    """

    def __init__(
        self,
        segment: Segment,
        features: Mapping[str, Feature],
        module: nn.Module,
        device: torch.device | None = None,
        no_tf32: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__(segment, features)
        self.module, self._no_tf32, self._channels_last = module, no_tf32, channels_last
        self.device = device or _device_of(module)

    @torch.no_grad()
    def _run_impl(self, inputs: dict[str, torch.Tensor], sizes: dict[str, int]) -> dict[str, torch.Tensor]:
        with torch.autocast(self.device.type, enabled=False), without_tf32() if self._no_tf32 else nullcontext():
            try:
                result = self.module(*(self._laid(inputs[name]) for name in self.segment.inputs))
            except ProgramError as error:
                raise EngineError(f"segment {self.segment.name}: {error}") from error
            except torch.OutOfMemoryError as error:
                raise EngineMemoryError(f"segment {self.segment.name}: {first_line(error)}") from error
        outputs = (result,) if isinstance(result, torch.Tensor) else tuple(result)
        if len(outputs) != len(self.segment.outputs):
            raise EngineError(
                f"segment {self.segment.name}: the module returned {len(outputs)} tensors, expected "
                f"{len(self.segment.outputs)} ({', '.join(self.segment.outputs)})"
            )
        return self._checked(dict(zip(self.segment.outputs, outputs, strict=True)), sizes)

    def _laid(self, tensor: torch.Tensor) -> torch.Tensor:
        """A feature as the module takes it."""
        return tensor.contiguous(memory_format=torch.channels_last) if self._channels_last and tensor.dim() == 4 else tensor


def _device_of(module: nn.Module) -> torch.device:
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


class Torch(Engine):
    """Saves a segment's exported program and runs it with PyTorch, on the GPU where PyTorch finds one.

    Args:
        device: where to run; by default the GPU, or the CPU where there is none.
        channels_last: weights and features of convolutions lie channels last, as tensor cores take them. Off by default: it has
            not been timed on a card (``make gpu-check`` does).
        cudnn_benchmark: cuDNN times its ways of a convolution when a shape first comes, and takes the fastest. It holds for the
            whole process (``torch.backends.cudnn.benchmark``). Off by default: each new size of picture then takes longer the
            first time, and other ways may be taken in another process, which change the last digits.
    """

    name = "torch"
    compiles = True
    wants_program = True

    def __init__(
        self, device: torch.device | str | None = None, channels_last: bool = False, cudnn_benchmark: bool = False
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._channels_last = channels_last
        if cudnn_benchmark:
            torch.backends.cudnn.benchmark = True

    def version(self) -> str:
        """PyTorch's version."""
        return str(torch.__version__)

    def compile(
        self, traced: Traced, stem: Path, profile: Profile, targets: Sequence[str], cache_dir: Path | None = None
    ) -> list[Path]:
        """Write ``<stem>.pt2``. The profile does not bind: the program takes every size that it was traced for.

        Raises:
            EngineError: targets were given; a program runs wherever PyTorch does.
        """
        self.check_targets(targets)
        assert traced.program is not None
        path = Path(f"{stem}.pt2")  # not with_suffix: a stem such as down.0 has a dot of its own
        path.parent.mkdir(parents=True, exist_ok=True)
        # Through memory: where PyTorch writes a file itself, a full disk ends the process.
        archive = io.BytesIO()
        torch.export.save(traced.program, archive)
        with ZipFile(archive) as saved:
            without_pickles(saved, path)
        return [path]

    def check_device(self) -> None:
        """Raise EngineError where it is to run on a GPU and PyTorch reaches none."""
        if self.device.type == "cuda" and (missing := missing_gpu()):
            raise EngineError(
                f"engine {self.name} cannot run on {self.device} here: that needs an NVIDIA GPU and driver, and a PyTorch built "
                f"for CUDA ({missing}); install them, or leave the device out to run on the CPU"
            )

    def recorder(self) -> Recorder | None:
        """CUDA graphs, on a GPU."""
        return CudaRecorder(self.device) if self.device.type == "cuda" else None

    def load(self, bundle: Bundle, segment: Segment) -> Runner:
        """The segment's program as a runner on this engine's device.

        Raises:
            EngineError: there is no GPU where it is to run on one, the bundle has no program for the segment, or this PyTorch
                cannot read it.
            BundleError: the file is damaged.
        """
        self.check_device()
        path, *_ = self.compiled_files(bundle, segment)
        try:
            module = read_program(path, self.device)
        except ProgramError as error:
            raise NeedsBuildError(
                f"{path} cannot be read by PyTorch {self.version()}: {error}; it was made by PyTorch "
                f"{segment.engines[self.name].version}"
            ) from error
        no_tf32 = self.device.type == "cuda" and bundle.manifest.precision_of(segment) == "fp32"
        if self._channels_last:
            module.lay_channels_last()
        return ModuleRunner(segment, bundle.manifest.features, module, self.device, no_tf32, self._channels_last)
