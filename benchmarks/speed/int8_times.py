"""Times of int8 over those of fp32, for `benchmarks.speed.int8`: a step of a UNet, and single segments of a UNet of another size.

One thread, CPU seconds of the process; all cases take turns, and a ratio is of one round.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.condconv.forms import ratios
from benchmarks.speed.full_size import Traceable, export, measured_units, random_inputs
from benchmarks.speed.int8_bundles import VARIANTS, Feeds, quantised
from engines import Bundle
from engines.bundle.names import NOISE, SAMPLE, TEXT, TIMESTEP
from engines.ort.engine import OnnxRuntime
from exporter.graph.partition import partition
from exporter.graph.unit_modules import SegmentModule
from runtime import LoadedBundle
from tuning.checkpoints.find_source import random_unet

__all__ = ["FP32", "segment_times", "step_times"]

FP32 = "fp32"
_ROWS = 2
"""Of a UNet call: a picture with guidance."""
_IN_A_ROW = 5
"""Steps of a turn: a small UNet's weights stay in the processor's caches from step to step."""
Figures = dict[str, dict[str, float]]


def step_times(bundles: Mapping[str, Bundle], rounds: int) -> Figures:
    """A step of the UNet of each bundle, the first size of its pictures, over that of the bundle in fp32."""
    engine, runs = OnnxRuntime(threads=1, device="cpu"), {}
    for name, bundle in bundles.items():
        manifest, network = bundle.manifest, LoadedBundle.load(bundle, engine)
        height, width = (side // manifest.vae_scale for side in manifest.sizes[0])
        sizes = {"batch": _ROWS, "height": height, "width": width, "tokens": manifest.text_length}
        given = random_inputs((SAMPLE, TIMESTEP, TEXT), manifest.features, sizes)
        runs[name] = partial(network.compute, NOISE, given)
    return ratios(runs, FP32, rounds, _IN_A_ROW)


def segment_times(source: str, units: Sequence[str], side: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Units of a UNet with random weights, each a segment, with latents of ``side`` x ``side``: int8 over fp32.

    They are calibrated on the numbers that they are timed with.

    Raises:
        TuningError: as ``random_unet``.
    """
    bundle, given = _exported(source, units, side, folder / "fp32")
    feeds: Feeds = {name: [{key: tensor.numpy() for key, tensor in inputs.items()}] for name, inputs in given.items()}
    bundles = {FP32: bundle, "int8": quantised(bundle, folder / "int8", feeds, VARIANTS[0])}
    engine, found = OnnxRuntime(threads=1, device="cpu"), {}
    for name, inputs in given.items():
        runners = {kind: engine.load(each, each.manifest.segment(name)) for kind, each in bundles.items()}
        found[name] = ratios({kind: partial(runner.run, inputs) for kind, runner in runners.items()}, FP32, rounds)
    return found


def _exported(source: str, chosen: Sequence[str], side: int, folder: Path) -> tuple[Bundle, dict[str, dict[str, Tensor]]]:
    """A bundle of the chosen units of a UNet, and random inputs of each."""
    unet = random_unet(source)
    units, features, modules = measured_units(unet, side)
    parts: list[Traceable] = [
        (segment, SegmentModule([u for u in units if u.name in segment.units], modules, segment.inputs, segment.outputs))
        for segment in partition(units, "unit")
        if segment.name in chosen
    ]
    sizes = {"batch": _ROWS, "height": side, "width": side}
    given = {segment.name: random_inputs(segment.inputs, features, sizes) for segment, _ in parts}
    return export(folder, unet, parts, units, features), given
