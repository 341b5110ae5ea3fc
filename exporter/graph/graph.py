"""The whole of a checkpoint as one graph: text encoder, the UNet's units and both halves of the VAE."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from engines.bundle.manifest import Feature, Segment, Unit, VaePrecision
from engines.bundle.names import IMAGE, LATENTS, OUTSIDE, SAMPLE, TEXT, TIMESTEP, TOKENS, VAE_DECODER, VAE_ENCODER
from engines.bundle.shapes import size_fault
from exporter.errors import BuildError, SourceError
from exporter.graph.components import Components
from exporter.graph.shapes_and_macs import infer_shapes_and_macs
from exporter.graph.topology import depth_factor, topology
from exporter.graph.unit_modules import SegmentModule
from runtime.plans.plan import Plan
from tuning.checkpoints.configs import latent_size

if TYPE_CHECKING:
    from exporter.graph.checkpoint import Checkpoint

__all__ = ["DTYPE", "Graph", "check_size", "load_graph"]

DTYPE: dict[VaePrecision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Of weights, and of the features between segments; bfloat16 is the VAE's only, and stays inside it."""


@dataclass(frozen=True)
class Graph:
    """Units in an order in which they can run, what loads their weights, every feature, and the sizes that hold for all."""

    units: tuple[Unit, ...]
    parts: Components
    features: Mapping[str, Feature]
    depth: int
    """Latent height and width must be multiples of this."""
    vae_scale: int
    latent_channels: int
    text_length: int
    vocabulary: int
    size: tuple[int, int]
    """Picture height and width in pixels at which MACs were counted: the first one asked for, or the model's own."""

    @property
    def size_multiple(self) -> int:
        """Picture height and width must be multiples of this many pixels."""
        return self.vae_scale * self.depth

    @property
    def unet_units(self) -> tuple[Unit, ...]:
        """The units that a plan can name."""
        return tuple(unit for unit in self.units if unit.name not in OUTSIDE)

    def parameters(self, segment: Segment) -> int:
        """How many weights a segment has."""
        return sum(unit.parameters for unit in self.units if unit.name in segment.units)

    def segment_module(self, segment: Segment) -> SegmentModule:
        """The torch module that computes a segment, with its weights; SourceError where they cannot be read."""
        units = [unit for unit in self.units if unit.name in segment.units]
        modules = self.parts.load(unit.name for unit in units)
        return SegmentModule(units, modules, segment.inputs, segment.outputs)


def load_graph(
    checkpoint: "Checkpoint",
    variant: str,
    dtype: torch.dtype,
    size: tuple[int, int] | None = None,
    vae_dtype: torch.dtype | None = None,
    clip_skip: int = 0,
    plans: Sequence[Plan] = (),
) -> Graph:
    """Derive a checkpoint's graph from its configurations; weights are loaded when a segment is asked for.

    Args:
        checkpoint: from ``open_source``.
        variant: which UNet.
        dtype: of the weights and of the features inside the graph; its inputs and outputs stay float32.
        size: picture height and width in pixels at which MACs are counted; None for the model's own size.
        vae_dtype: of the VAE's weights, by default ``dtype``.
        clip_skip: how many of the text encoder's last layers are left out.
        plans: where one names a part of a transformer, transformers are cut into parts.

    Raises:
        SourceError: the UNet is of another family, or the parts do not fit together.
        BuildError: the size is not a multiple of what the UNet's depth needs, or the text encoder has fewer layers.
    """
    parts = Components(checkpoint, variant, dtype, vae_dtype, clip_skip, plans)
    unet: Any = parts.models["unet"]
    vae: Any = parts.models["vae"].config
    text: Any = parts.models["text_encoder"].config
    checkpoint.check_fit(unet.config, vae, text)
    scale, depth = 2 ** (len(vae.block_out_channels) - 1), depth_factor(unet)
    height, width = latent_size(unet.config)
    own = height * scale, width * scale
    if size is None and (fault := size_fault(own, scale * depth)):
        raise BuildError(f"the model's own size is {fault}; name one with --sizes")
    size = size or own
    check_size(size, scale * depth)
    ends = zip((TEXT, VAE_DECODER, VAE_ENCODER), (TOKENS, LATENTS, IMAGE), strict=True)
    first, *last = (Unit(name=name, kind=name, inputs=(given,)) for name, given in ends)
    chain = (first, *topology(unet, parts.in_parts), *last)
    sizes = {"height": size[0] // scale, "width": size[1] // scale}
    modules = parts.modules(unit.name for unit in chain)
    text_length = checkpoint.text_length(text)
    inputs = _inputs(unet.config, vae, text_length, scale)
    try:
        units, features = infer_shapes_and_macs(chain, modules, inputs, sizes)
    except Exception as error:  # of many kinds: the libraries check few of the numbers that they compute with
        reason = str(error).partition("\n")[0]
        raise SourceError(
            f"source {checkpoint.name}: its models cannot be computed as they are configured ({reason}); "
            "get its configurations again"
        ) from error
    return Graph(
        units=tuple(units),
        parts=parts,
        features={**features, TEXT: _of_any_length(features[TEXT])},
        depth=depth,
        vae_scale=scale,
        latent_channels=unet.config.in_channels,
        text_length=text_length,
        vocabulary=text.vocab_size,
        size=size,
    )


def _inputs(unet: Any, vae: Any, text_length: int, scale: int) -> dict[str, Feature]:
    """The features that no unit makes, from the models' configurations."""
    picture = vae.in_channels, f"{scale}*height", f"{scale}*width"
    return {
        TOKENS: Feature(dtype="int64", shape=("batch", text_length)),
        SAMPLE: Feature(dtype="float32", shape=("batch", unet.in_channels, "height", "width")),
        TIMESTEP: Feature(dtype="float32", shape=(1,)),
        LATENTS: Feature(dtype="float32", shape=("images", vae.latent_channels, "height", "width")),
        IMAGE: Feature(dtype="float32", shape=("images", *picture)),
    }


def _of_any_length(text: Feature) -> Feature:
    """Text features as the UNet takes them: the text encoder makes so many tokens, and of several chunks there are more."""
    rows, length, width = text.shape
    return text.model_copy(update={"shape": (rows, f"tokens={length}", width)})


def check_size(size: tuple[int, int], multiple: int) -> None:
    """Raise BuildError unless the UNet's depth divides a picture size (height, width) in pixels."""
    if fault := size_fault(size, multiple):
        raise BuildError(f"size {fault}")
