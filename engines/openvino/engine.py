"""OpenVINO: runs a bundle's ONNX segments as they are, on the CPU, in single precision or in bfloat16.

Nothing is compiled when a bundle is built: a segment is read in less time than a compiled copy of it, which would hold all
weights once more. Shapes stay symbolic; kernels are made for the shapes that come and are kept.
"""

from collections.abc import Mapping
from typing import Any

import torch

from engines.base import DTYPES, Engine, Runner
from engines.bundle.folder import Bundle
from engines.bundle.manifest import Feature, Manifest, Segment, VaePrecision
from engines.errors import EngineError, NeedsBuildError
from engines.onnx_file import check_names, checked_onnx, explaining, onnx_files
from engines.openvino.waves import split_waves
from engines.support.environment import install_command

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
        path = checked_onnx(bundle, onnx_files(bundle, segment))
        precision = self.precision_of(bundle.manifest, segment)
        try:
            model = self._core.read_model(str(path))
            waves = split_waves(model) if precision == "bf16" else None
            compiled = self._compiled(model, "bf16" if precision == "bf16" else "f32")
            made_before = None if waves is None else self._compiled(waves, "f32")
        except RuntimeError as error:
            raise EngineError(
                f"segment {segment.name}: OpenVINO {self.version()} refuses {path}: {' '.join(str(error).split())}; "
                "install a newer openvino, or choose another engine"
            ) from error
        check_names(segment, path, _names(model.inputs) - _wave_names(made_before), _names(model.outputs))
        return _RequestRunner(segment, bundle.manifest.features, self._openvino.Tensor, compiled, made_before)

    def _compiled(self, model: Any, precision: str) -> Any:
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": precision,
            "ENABLE_CPU_PINNING": False,  # every segment, and every process, would take the same first cores
        }
        return self._core.compile_model(model, "CPU", options)


class OpenVINOBfloat16(OpenVINO):
    """Runs ONNX segments in bfloat16, whatever precision they were built in; features between them stay as they are.

    The waves of the timestep's embedding stay in single precision: ``engines.openvino.waves``.
    """

    name = "openvino-bf16"

    def check_device(self) -> None:
        """Raise EngineError unless the processor multiplies in bfloat16."""
        if "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise EngineError(
                f"engine {self.name} needs a processor that multiplies in bfloat16 (AVX-512 BF16 or AMX), and this one does not; "
                "choose --engine openvino or --engine onnxruntime"
            )

    def precision_of(self, manifest: Manifest, segment: Segment) -> VaePrecision:
        """Bfloat16."""
        return "bf16"


def _names(ports: Any) -> set[str]:
    return {port.get_any_name() for port in ports}


def _wave_names(waves: Any) -> set[str]:
    return set() if waves is None else {f"wave.{number}" for number in range(len(waves.outputs))}


class _RequestRunner(Runner):
    """OpenVINO reads and writes the tensors' own memory. Each thread takes a request, and puts it back for the next call.

    A request that is used again need not learn its shapes again. It keeps no tensor alive: all that it reads or writes is set
    anew at each call.
    """

    def __init__(self, segment: Segment, features: Mapping[str, Feature], tensor: Any, compiled: Any, waves: Any | None) -> None:
        super().__init__(segment, features)
        self._tensor, self._compiled, self._waves = tensor, compiled, waves
        self._idle: list[tuple[Any, Any]] = []
        self._taken = _names(compiled.inputs) - _wave_names(waves)
        self._taken_by_waves = set() if waves is None else _names(waves.inputs)

    def _run_impl(self, inputs: dict[str, torch.Tensor], sizes: dict[str, int]) -> dict[str, torch.Tensor]:
        taken = {name: inputs[name].detach().contiguous() for name in self._taken | self._taken_by_waves}
        outputs = {
            name: torch.empty(shape, dtype=DTYPES[self.features[name].dtype]) for name, shape in self.output_shapes(sizes).items()
        }
        with explaining(self.segment, "OpenVINO"):
            requests = self._requests()
            self._infer(*requests, taken, outputs)
            self._idle.append(requests)
        return outputs

    def _requests(self) -> tuple[Any, Any]:
        """A request of the segment's model that no other thread has, and one of its waves' model."""
        try:
            return self._idle.pop()
        except IndexError:
            return self._compiled.create_infer_request(), None if self._waves is None else self._waves.create_infer_request()

    def _infer(self, request: Any, waves: Any, taken: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> None:
        if waves is not None:
            self._bind(waves, {name: taken[name] for name in self._taken_by_waves})
            waves.infer(share_inputs=True, share_outputs=True)
            for number, wave in enumerate(waves.output_tensors):
                request.set_tensor(f"wave.{number}", wave)
        self._bind(request, {name: taken[name] for name in self._taken} | outputs)
        request.infer(share_inputs=True, share_outputs=True)
        for name, tensor in outputs.items():
            if tuple(request.get_tensor(name).shape) != tuple(tensor.shape):
                raise NeedsBuildError(f"segment {self.segment.name} made {name} of a wrong shape")

    def _bind(self, request: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            request.set_tensor(name, self._tensor(tensor.numpy(), shared_memory=True))
