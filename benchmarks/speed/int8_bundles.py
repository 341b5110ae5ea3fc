"""Bundles whose UNet computes in int8, for `benchmarks.speed.int8`: what the engine runs in fp32, quantised by ONNX Runtime.

Static quantisation in QDQ form. Weights are int8, with a scale for each output channel; what they are multiplied by is uint8,
with one scale and zero point for each tensor, whose range is from the least to the most that it held in calibration. Outputs are
rounded of convolutions alone, for which ONNX Runtime has no int8 kernel that puts out fp32. Attention itself, norms, activations
and sums stay in fp32, and so do text encoder and VAE.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from rich.progress import track
from torch import Tensor

from engines import Bundle, Runner, Segment
from engines.bundle.folder import MANIFEST_NAME, describe_file
from engines.bundle.names import NOISE, STEM, TIME
from engines.ort.engine import OnnxRuntime
from engines.support.cli import quiet_logs
from runtime.pipeline import Pipeline

__all__ = ["CONVOLUTIONS", "PRODUCTS", "VARIANTS", "Feeds", "Recording", "Variant", "counted", "graph_of", "quantised", "record"]

CONVOLUTIONS, PRODUCTS = ("Conv",), ("MatMul", "Gemm")
Feeds = dict[str, list[dict[str, np.ndarray]]]
"""By segment, what it was given: in each run an array for each of its inputs."""
_ENDS = frozenset({STEM, TIME, NOISE})
"""The units at a UNet's ends; the time embedding is computed beside the stem."""


@dataclass(frozen=True)
class Variant:
    """Which operators of which segments compute in int8."""

    name: str
    operators: tuple[str, ...] = CONVOLUTIONS + PRODUCTS
    ends: bool = True
    """Whether segments that hold the stem, the time embedding or the head are among them."""

    def takes(self, segment: Segment) -> bool:
        """Whether a segment of the UNet is to be quantised."""
        return self.ends or _ENDS.isdisjoint(segment.units)


VARIANTS = (
    Variant("int8"),
    Variant("int8, ends fp32", ends=False),
    Variant("int8, Conv only", CONVOLUTIONS),
    Variant("int8, MatMul only", PRODUCTS),
)


class _Recorder(Runner):
    """Runs another runner and keeps copies of what it is given."""

    def __init__(self, runner: Runner, runs: list[dict[str, np.ndarray]]) -> None:
        super().__init__(runner.segment, runner.features)
        self._runner, self._runs, self.device = runner, runs, runner.device

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As ``Runner.run``."""
        self._runs.append({name: inputs[name].numpy().copy() for name in self.segment.inputs})
        return self._runner.run(inputs)

    def _run_impl(self, inputs: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, Tensor]:
        raise NotImplementedError("the other runner checks its inputs itself")


class Recording(OnnxRuntime):
    """The onnxruntime engine on the CPU, which keeps what every segment that it loaded is given."""

    def __init__(self) -> None:
        super().__init__(device="cpu")
        self.feeds: Feeds = defaultdict(list)

    def load(self, bundle: Bundle, segment: Segment) -> Runner:
        """As ``OnnxRuntime.load``."""
        return _Recorder(super().load(bundle, segment), self.feeds[segment.name])


def record(bundle: Bundle, prompts: Sequence[str], plans: Sequence[str], *, steps: int, guidance: float) -> Feeds:
    """The inputs of every segment while pictures of the prompts are drawn, all at once, by one plan after another.

    The noise is that of seeds from 1,000,000 on, which no picture that is judged starts from.

    Raises:
        BundleError, EngineError, PlanError: as ``Pipeline`` and its ``generate``.
    """
    engine = Recording()
    pipeline = Pipeline(bundle, engine)
    for plan in track(plans, "recording"):
        pipeline.generate([*prompts], steps=steps, guidance_scale=guidance, seed=10**6, plan=plan, output_type="latent")
    return engine.feeds


class _Reader:
    """Gives one run after another, as ONNX Runtime's ``CalibrationDataReader`` does."""

    def __init__(self, runs: Sequence[dict[str, np.ndarray]]) -> None:
        self._runs = iter(runs)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next run's inputs; None after the last."""
        return next(self._runs, None)


def quantised(bundle: Bundle, folder: Path, feeds: Feeds, variant: Variant) -> Bundle:
    """A copy of a bundle in which a variant's segments compute in int8.

    Args:
        bundle: in fp32, for engine onnxruntime.
        folder: of the copy; it is made.
        feeds: what ``record`` found for the segments.
        variant: what is quantised; segments without such an operator stay as they are.
    """
    bundle.copy_to(folder)  # onnx reads weights from no file of several names, as those that builds share are
    written = []
    for segment in track(bundle.manifest.segments, variant.name):
        path = graph_of(Bundle(folder, bundle.manifest), segment)
        chosen = segment in bundle.manifest.unet_segments and variant.takes(segment)
        if chosen and any(counted(path, variant.operators)):
            target = path.with_name(f"{segment.name}.int8.onnx")
            _quantise(path, target, feeds[segment.name], variant.operators)
            segment = segment.model_copy(update={"onnx": (describe_file(folder, target),), "engines": {}})
        written.append(segment)
    manifest = bundle.manifest.model_copy(update={"segments": tuple(written)})
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1) + "\n", "utf-8")
    return Bundle(folder, manifest)


def graph_of(bundle: Bundle, segment: Segment) -> Path:
    """The ONNX file of a segment that engine onnxruntime runs: its own copy where there is one."""
    compiled = segment.engines.get(OnnxRuntime.name)
    return bundle.folder / (*(compiled.files if compiled else ()), *segment.onnx)[0].path


def _quantise(path: Path, target: Path, runs: Sequence[dict[str, np.ndarray]], operators: Sequence[str]) -> None:
    """Write an ONNX file in int8; ``runs`` are inputs of the segment, of which its graph may take fewer."""
    taken = [value.name for value in onnx.load(path, load_external_data=False).graph.input]
    with quiet_logs():  # ONNX Runtime advises to have graphs optimised first, which the exporter has done
        quantize_static(
            path,
            target,
            _Reader([{name: run[name] for name in taken} for run in runs]),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*operators],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"OpTypesToExcludeOutputQuantization": [*PRODUCTS]},
        )


def counted(path: Path, operators: Sequence[str]) -> tuple[int, int]:
    """How many such operators of an ONNX file compute in int8, and how many in fp32.

    In int8 are those that take what a DequantizeLinear made.
    """
    nodes = onnx.load(path, load_external_data=False).graph.node
    made = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    found = [node.input[0] in made and node.input[1] in made for node in nodes if node.op_type in operators]
    return sum(found), len(found) - sum(found)
