"""OpenVINO: runs a bundle's ONNX segments as they are, on the CPU, in single precision or in bfloat16.

Nothing is compiled when a bundle is built: a segment is read in less time than a compiled copy of it, which would hold all
weights once more. Batch and picture size stay symbolic; the length of the text is fixed, and each length has a model of its own.
OpenVINO 2026.4 computes attention wrongly where the length may be any, and other things where nothing may: docs/openvino.md.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from engines.base import Engine, Runner
from engines.bundle.folder import Bundle
from engines.bundle.manifest import Segment
from engines.errors import EngineError, EngineMemoryError, NeedsBuildError
from engines.onnx_file import check_names, checked_onnx
from engines.openvino.models import Models
from engines.openvino.runner import RequestRunner
from engines.support.environment import install_command
from engines.support.records import one_line

__all__ = ["OpenVINO", "OpenVINOBfloat16"]


class OpenVINO(Engine):
    """Runs ONNX segments in single precision.

    Args:
        threads: CPU threads of a segment; by default as many as PyTorch takes, which is one per physical core unless
            ``OMP_NUM_THREADS`` or ``torch.set_num_threads`` says otherwise.

    Raises:
        EngineError: openvino is not installed.
    """

    name = "openvino"
    compiles = False

    def __init__(self, threads: int | None = None) -> None:
        try:
            import openvino
        except ImportError as error:
            raise EngineError(
                f"engine {self.name} cannot be used: {error}; install it with: {install_command('openvino')}"
            ) from error
        if threads is not None and threads < 1:
            raise EngineError(f"engine {self.name}: got {threads} threads, expected 1 or more, or None for one per core")
        self._openvino: Any = openvino
        self._core: Any = openvino.Core()
        self.threads = threads or torch.get_num_threads()

    def version(self) -> str:
        """OpenVINO's version, without its build's name."""
        return str(self._openvino.__version__).partition("-")[0]

    def load(self, bundle: Bundle, segment: Segment) -> Runner:
        """A compiled model of the segment's ONNX file, after checking the hashes of all its files.

        Raises:
            EngineError: the segment has no ONNX file, OpenVINO refuses it, or the processor has not what the engine computes in.
            BundleError: a file is missing or damaged.
        """
        self.check_device()
        if not segment.onnx:
            raise NeedsBuildError(f"bundle {bundle.folder} has no ONNX file for segment {segment.name}")
        path = checked_onnx(bundle, segment.onnx)
        rounds = "bf16" in {self.computes_in, bundle.manifest.precision_of(segment)}
        with _refusing(segment, self.version(), path):
            models = Models(self._core, path, bundle.manifest.features, self._options, rounds=rounds)
            first = models.of_length(bundle.manifest.text_length)
        check_names(segment, path, first.taken, first.made)
        return RequestRunner(segment, bundle.manifest.features, models)

    def _options(self, precision: str) -> dict[str, Any]:
        return {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": precision,
            "ENABLE_CPU_PINNING": False,  # every segment, and every process, would take the same first cores
        }


class OpenVINOBfloat16(OpenVINO):
    """Runs ONNX segments in bfloat16, whatever precision they were built in; features between them stay as they are.

    The waves of the timestep's embedding stay in single precision: ``engines.openvino.waves``.
    """

    name = "openvino-bf16"
    computes_in = "bf16"

    def check_device(self) -> None:
        """Raise EngineError unless the processor multiplies in bfloat16."""
        if "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise EngineError(
                f"engine {self.name} needs a processor that multiplies in bfloat16 (AVX-512 BF16 or AMX), and this one does not; "
                "choose --engine openvino or --engine onnxruntime"
            )


@contextmanager
def _refusing(segment: Segment, version: str, path: Path) -> Iterator[None]:
    """Say which segment it is whose file OpenVINO does not take."""
    try:
        yield
    except MemoryError as error:
        raise EngineMemoryError(f"segment {segment.name}: there is no memory left to load it") from error
    except RuntimeError as error:
        raise NeedsBuildError(
            f"segment {segment.name}: OpenVINO {version} refuses {path}, which another version may take: {one_line(error)}"
        ) from error
