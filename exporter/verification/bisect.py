"""``verify --bisect SEGMENT``: the first layer of a segment that an engine computes otherwise than the graph says.

Two backends run the same segment on the same features, those that the torch model makes: the engine, and ONNX Runtime in float32
without optimisation. Tensors in the middle are put out too, one at a time, for a tensor that is an output keeps its layer from
being fused with the next: where the fault lies in a fused kernel, it goes when one looks inside, and that is what is reported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from engines import DTYPES, Bundle, Engine, Segment, UserError
from engines.onnx_file import checked_onnx
from exporter.graph.graph import check_size
from exporter.verification.backends import Deviation, check_polygraphy, compare, run_reference
from exporter.verification.inputs import counts_to_compare, images_at_a_time, random_inputs, sizes_to_compare
from exporter.verification.layers import Layer, LayeredSegment
from exporter.verification.metrics import relative_error
from exporter.verification.verify import TOLERANCE, Reference

__all__ = ["Bisection", "Culprit", "LayerSearch", "Setting", "bisect"]


@dataclass(frozen=True)
class Setting:
    """The reference of a comparison and its size: picture height and width in pixels, and the number of images."""

    segment: str
    engine: str
    height: int
    width: int
    images: int
    tolerance: float


@dataclass(frozen=True)
class Culprit:
    """The first layer that departs: its tensor is off by ``deviation`` while those it reads are within what is allowed.

    ``fused_over`` is None, or the tensor at which the fault went away when it was put out: then it lies in the kernel that
    the engine fuses over that tensor, somewhere between ``inputs`` and the layer.
    """

    layer: Layer
    deviation: Deviation
    inputs: Mapping[str, float]
    fused_over: str | None = None


@dataclass(frozen=True)
class Bisection:
    """The findings: errors of the segment's outputs, each relative to the maximum of what it is compared with.

    ``graph_error`` is ONNX Runtime's in float32 against torch: where it is too large, the ONNX file is wrong and no engine is to
    blame. ``engine_error`` is the bundle's own engine against torch, ``outputs`` the backend that is bisected against ONNX
    Runtime. ``culprit`` is None where these agree.
    """

    setting: Setting
    graph_error: float
    engine_error: float
    outputs: Mapping[str, Deviation]
    culprit: Culprit | None
    runs: int


def bisect(
    bundle: Bundle, engine: Engine, name: str, size: tuple[int, int] | None = None, reference: Reference | None = None
) -> Bisection:
    """Find the first layer of a segment that departs.

    Args:
        bundle: with the segment, and the source that it was made from.
        engine: ``onnxruntime``, ``tensorrt`` or ``tensorrt-rtx``.
        name: of the segment.
        size: picture height and width in pixels, by default the smallest that ``verify`` takes.
        reference: the source's model, by default loaded here.

    Raises:
        UserError: there is no such segment, or Polygraphy is not installed.
        BuildError, SourceError: as ``verify``.
        EngineError: the engine cannot be bisected, or refuses the segment.
    """
    segment, manifest = _segment(bundle, name), bundle.manifest
    engine.check_device()
    check_polygraphy(engine)
    if size is not None:
        check_size(size, manifest.size_multiple)
    height, width = size or min(sizes_to_compare(manifest, engine), key=lambda side: side[0] * side[1])
    images = images_at_a_time(manifest, engine, segment) or counts_to_compare(manifest, engine)[0]
    setting = Setting(name, engine.name, height, width, images, TOLERANCE[manifest.precision_of(segment)])
    features = (reference or Reference.load(bundle)).features(random_inputs(manifest, engine, images, height, width))
    given = {key: features[key].to(DTYPES[manifest.features[key].dtype]) for key in segment.inputs}
    made = engine.load(bundle, segment).run({key: tensor.to(engine.device) for key, tensor in given.items()})
    with TemporaryDirectory(prefix="unet-heirloom-") as folder:
        reference_copy, tested = _copies(bundle, engine, segment, Path(folder))
        feed = {key: _array(tensor) for key, tensor in given.items()}
        search = LayerSearch(engine, reference_copy, tested, feed, setting.tolerance)
        graph, outputs = search.outputs_of_reference(), search.look(())
        return Bisection(
            setting,
            max(relative_error(torch.from_numpy(graph[key]), features[key]) for key in segment.outputs),
            max(relative_error(made[key], features[key]) for key in segment.outputs),
            outputs,
            search.first(outputs),
            search.runs,
        )


def _segment(bundle: Bundle, name: str) -> Segment:
    names = [segment.name for segment in bundle.manifest.segments]
    if name not in names:
        raise UserError(f"bundle {bundle.folder} has no segment {name!r}; choose one of {', '.join(names)}")
    segment = bundle.manifest.segment(name)
    if not segment.onnx:
        raise UserError(
            f"segment {name} of bundle {bundle.folder} has no ONNX file to bisect; build it with --engine onnxruntime"
        )
    return segment


def _copies(bundle: Bundle, engine: Engine, segment: Segment, folder: Path) -> tuple[LayeredSegment, LayeredSegment]:
    """The ONNX file in float32, and the file that the engine runs or is compiled from."""
    compiled = segment.engines.get(engine.name) if engine.name == "onnxruntime" else None
    copies = compiled.files if compiled is not None else ()
    reference, tested = checked_onnx(bundle, segment.onnx), checked_onnx(bundle, (*copies, *segment.onnx))
    return LayeredSegment(reference, folder / "reference", single=True), LayeredSegment(tested, folder / "tested")


class LayerSearch:
    """One segment on two backends.

    Args:
        engine: runs ``tested``; see ``backends.compare``.
        reference: the segment in float32.
        tested: what the engine runs, with the same names of tensors where it has the same tensors.
        feed: the segment's inputs, float32 where they are real numbers.
        tolerance: how far a tensor may be from the reference's, relative to the reference's maximum.
    """

    def __init__(
        self, engine: Engine, reference: LayeredSegment, tested: LayeredSegment, feed: Mapping[str, np.ndarray], tolerance: float
    ) -> None:
        self._engine, self._reference, self._tested, self._feed, self._tolerance = engine, reference, tested, feed, tolerance
        self.runs = 0
        self._layers = {layer.tensor: layer for layer in tested.layers()}
        self._common = self._layers.keys() & {layer.tensor for layer in reference.layers()}

    def look(self, tensors: Sequence[str]) -> dict[str, Deviation]:
        """How far these tensors and the segment's outputs are from the reference."""
        self.runs += 1
        reference, tested = self._reference.marked(tensors), self._tested.marked(tensors)
        return compare(self._engine, reference, tested, self._feed, self._tolerance)

    def outputs_of_reference(self) -> dict[str, np.ndarray]:
        """The segment's outputs as ONNX Runtime computes them in float32."""
        return run_reference(self._reference.marked(()), self._feed)

    def first(self, outputs: Mapping[str, Deviation]) -> Culprit | None:
        """The first layer that departs, given how the segment's outputs do; None where none does."""
        found = self._first_of(outputs)
        while found is not None:
            found, fused_over = self._halve(found)
            inputs = self._nearest(found)
            errors = self.look([*inputs, found])
            read = {name: errors[name].error for name in inputs}
            departing = self._first_of({name: errors[name] for name in inputs})
            if departing is None or fused_over is not None:
                layer = self._layers[found]
                deviation = outputs[found] if fused_over is not None and found in outputs else errors[found]
                return Culprit(layer, deviation, read, fused_over)
            found = departing
        return None

    def _halve(self, found: str) -> tuple[str, str | None]:
        """Between what is given, which agrees, and a tensor that departs: one that departs after one that does not.

        With it, the tensor that hid the fault when it was put out, if one did.
        """
        before = self._ancestors(found)
        low, high = -1, len(before)
        while high - low > 1:
            middle = (low + high) // 2
            errors = self.look([before[middle], found])
            if errors[before[middle]].departs:
                high = middle
            elif errors[found].departs:
                low = middle
            else:
                return found, before[middle]
        return (found if high == len(before) else before[high]), None

    def _first_of(self, errors: Mapping[str, Deviation]) -> str | None:
        return next((name for name in self._layers if name in errors and errors[name].departs), None)

    def _ancestors(self, tensor: str) -> list[str]:
        """The tensors that one is computed from and that both sides have, in order."""
        needed = {tensor}
        for layer in reversed(list(self._layers.values())):
            if layer.tensor in needed:
                needed.update(layer.inputs)
        return [name for name in self._layers if name in needed and name in self._common and name != tensor]

    def _nearest(self, tensor: str) -> list[str]:
        """The last of these on each way to the tensor."""
        found, todo = [], list(self._layers[tensor].inputs)
        while todo:
            name = todo.pop(0)
            if name not in self._common:
                todo += self._layers[name].inputs
            elif name not in found:
                found.append(name)
        return found


def _array(tensor: Tensor) -> np.ndarray:
    """As both sides are fed: what is half precision has its values in float32."""
    return (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().contiguous().numpy()
