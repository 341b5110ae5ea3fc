"""UNets with random weights in ONNX Runtime, for benchmarks of time: no checkpoint is needed for those.

A UNet's segments are traced as every build traces them and loaded by the engine that every bundle is run with, so that what is
timed is what users run. The text encoder and the VAE are left out.
"""

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from rich.progress import track
from torch import Tensor, nn

from engines import DTYPES, Bundle, Manifest, Segment, Unit, make_engine
from engines.bundle.folder import MANIFEST_NAME, describe_file
from engines.bundle.manifest import Compiled, Feature
from engines.bundle.names import SAMPLE, TEXT, TIMESTEP
from engines.bundle.shapes import resolve
from engines.ort.fuse_attention import fuse_attention
from exporter.graph.shapes_and_macs import infer_shapes_and_macs
from exporter.graph.topology import depth_factor, topology
from exporter.graph.unit_modules import unit_module
from exporter.segments.trace import trace
from tuning.ranking.timing import clock

__all__ = ["TOKENS", "Traceable", "export", "features_of", "measured_units", "random_inputs", "spread", "take_turns"]

TOKENS = 77
"""Of Stable Diffusion's text encoders."""

Traceable = tuple[Segment, nn.Module]
"""A segment, and the module that takes its inputs and returns its outputs in the order that the segment names."""


def features_of(unet: UNet2DConditionModel) -> dict[str, Feature]:
    """The features that a UNet is given."""
    return {
        SAMPLE: Feature(dtype="float32", shape=("batch", unet.config.in_channels, "height", "width")),
        TIMESTEP: Feature(dtype="float32", shape=(1,)),
        TEXT: Feature(dtype="float32", shape=("batch", TOKENS, unet.config.cross_attention_dim)),
    }


def measured_units(unet: UNet2DConditionModel, side: int) -> tuple[list[Unit], dict[str, Feature], dict[str, nn.Module]]:
    """A UNet's units with their MACs at latents of ``side`` x ``side``, all features, and the module of each unit."""
    units = topology(unet)
    modules = {unit.name: unit_module(unet, unit.name) for unit in units}
    measured, features = infer_shapes_and_macs(units, modules, features_of(unet), {"height": side, "width": side})
    return measured, features, modules


def export(
    folder: Path, unet: UNet2DConditionModel, parts: Sequence[Traceable], units: Sequence[Unit], features: Mapping[str, Feature]
) -> Bundle:
    """Trace segments into a bundle for ONNX Runtime that has nothing else; segments that ``folder`` has already are kept.

    The manifest comes last; it is as true as it needs to be for loading and running segments.
    """
    (folder / "segments").mkdir(parents=True, exist_ok=True)
    engine, depth, written = make_engine("onnxruntime"), depth_factor(unet), []
    for segment, module in track(parts, f"tracing {folder.name}"):
        path = folder / "segments" / f"{segment.name}.onnx"
        if not path.exists():
            _trace_into(path, segment, module, features, depth)
        copy = path.with_suffix(".ort.onnx")
        copies = [copy] if fuse_attention(path, copy) else []
        files = [file for file in (path, path.with_name(f"{path.name}.data")) if file.exists()]
        compiled = Compiled(files=tuple(describe_file(folder, file) for file in copies), version=engine.version())
        update = {"onnx": tuple(describe_file(folder, file) for file in files), "engines": {engine.name: compiled}}
        written.append(segment.model_copy(update=update))
    manifest = Manifest(
        key="0" * 64, variant="original", source="random", source_sha256="0" * 64, precision="fp32", sizes=((512, 512),),
        max_images=1, latent_channels=unet.config.in_channels, vae_scale=8, size_multiple=8 * depth, text_length=TOKENS,
        vocabulary=1, features=dict(features), units=tuple(units), segments=tuple(written), files=(), made_with={},
    )  # fmt: skip
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1) + "\n", "utf-8")
    return exported(folder)


def exported(folder: Path) -> Bundle:
    """A bundle that ``export`` wrote, as it is: it has only what is measured, which nobody else would take for whole."""
    return Bundle(folder, Manifest.model_validate_json((folder / MANIFEST_NAME).read_text("utf-8")))


def _trace_into(path: Path, segment: Segment, module: nn.Module, features: Mapping[str, Feature], depth: int) -> None:
    """Trace a segment; ``path`` is there only if its weights are, and both are whole."""
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        trace(segment, module, features, depth, Path(temporary) / path.name)
        for file in sorted(Path(temporary).iterdir(), reverse=True):  # the weights' name is the longer one
            file.rename(path.with_name(file.name))


def random_inputs(names: Sequence[str], features: Mapping[str, Feature], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Normal numbers in the shapes of features, for values of ``batch``, ``height`` and ``width``; the timestep is 500."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: resolve(features[name].shape, sizes) for name in names}
    inputs = {n: torch.randn(shape, generator=generator).to(DTYPES[features[n].dtype]) for n, shape in shapes.items()}
    return inputs | ({TIMESTEP: torch.tensor([500.0])} if TIMESTEP in names else {})


def take_turns(cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case, one of each in every round; a round before the first warms up.

    They are the process's own where it has one thread, so that other programs take no part in them; see ``clock``.
    """
    now = clock()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in track(range(rounds + 1), "rounds"):
        for name, case in cases.items():
            started = now()
            case()
            if number:
                seconds[name].append(now() - started)
    return seconds


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, least and most."""
    return {
        "median": round(statistics.median(values), digits), "low": round(min(values), digits), "high": round(max(values), digits)
    }  # fmt: skip
