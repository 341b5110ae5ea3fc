"""The whole of a checkpoint as one graph: text encoder, the UNet's units and both halves of the VAE, a torch module for each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from engines.manifest import Feature, Segment, Unit
from exporter.errors import BuildError, SourceError
from exporter.measure import measure
from exporter.sources import Checkpoint
from exporter.topology import SAMPLE, TEXT, TIMESTEP, depth_factor, topology
from exporter.units import SegmentModule, unit_module

__all__ = ["IMAGE", "LATENTS", "TOKENS", "VAE_DECODER", "VAE_ENCODER", "Graph", "check_size", "load_graph"]

TOKENS = "tokens"
"""Graph input: token numbers (batch, text length), int64."""
LATENTS = "latents"
"""Graph input of the VAE decoder: denoised latents (images, channels, height, width), float32."""
VAE_DECODER = "vae_decoder"
IMAGE = "image"
"""Graph input of the VAE encoder: a picture in [-1, 1] (images, 3, pixels, pixels), float32."""
VAE_ENCODER = "vae_encoder"

_LOG_VARIANCE = (-30.0, 20.0)
"""Bounds that diffusers' DiagonalGaussianDistribution sets."""


class TextEncoder(nn.Module):
    """Token numbers -> the text encoder's last hidden state, after its final norm."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.model(input_ids=tokens).last_hidden_state
        return result


class VaeDecoder(nn.Module):
    """Latents as the UNet has them -> picture in [-1, 1], float32; the VAE's scaling is done here."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.post_quant, self.decoder = vae.post_quant_conv, vae.decoder
        self.scaling = float(vae.config.scaling_factor)

    def forward(self, latents: Tensor) -> Tensor:
        x = (latents / self.scaling).to(self.decoder.conv_in.weight.dtype)
        if self.post_quant is not None:
            x = self.post_quant(x)
        result: Tensor = self.decoder(x)
        return result.float()


class VaeEncoder(nn.Module):
    """Picture in [-1, 1] -> the normal distribution of its latents as the UNet has them: means, then standard deviations.

    The result has twice the latents' channels and is float32. Samples are drawn outside: an engine has no seeds.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.quant, self.encoder = vae.quant_conv, vae.encoder
        self.scaling = float(vae.config.scaling_factor)

    def forward(self, image: Tensor) -> Tensor:
        x = self.encoder(image.to(self.encoder.conv_in.weight.dtype))
        if self.quant is not None:
            x = self.quant(x)
        mean, log_variance = x.float().chunk(2, dim=1)
        deviation = torch.exp(log_variance.clamp(*_LOG_VARIANCE) / 2)
        return self.scaling * torch.cat([mean, deviation], dim=1)


@dataclass(frozen=True)
class Graph:
    """Units in an order in which they can run, the module of each, every feature, and the sizes that hold for all."""

    units: tuple[Unit, ...]
    modules: Mapping[str, nn.Module]
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
        return tuple(unit for unit in self.units if unit.name not in {TEXT, VAE_DECODER, VAE_ENCODER})

    def segment_module(self, segment: Segment) -> SegmentModule:
        """The torch module that computes a segment."""
        units = [unit for unit in self.units if unit.name in segment.units]
        return SegmentModule(units, self.modules, segment.inputs, segment.outputs)


def load_graph(checkpoint: Checkpoint, variant: str, dtype: torch.dtype, size: tuple[int, int] | None = None) -> Graph:
    """Load a checkpoint's weights and derive its graph.

    Args:
        checkpoint: from ``open_source``.
        variant: which UNet.
        dtype: of the weights and of the features inside the graph; its inputs and outputs stay float32.
        size: picture height and width in pixels at which MACs are counted; None for the model's own size.

    Raises:
        SourceError: the UNet is of another family, or the parts do not fit together.
        BuildError: the size is not a multiple of what the UNet's depth needs.
    """
    unet, vae, text = checkpoint.unet(variant), checkpoint.vae(), checkpoint.text_encoder()
    for model in (unet, vae, text):
        nn.Module.to(model, dtype)  # diffusers' own warns of modules kept in float32, of which there are none here
    config: Any = text.config
    _check_fit(checkpoint, unet, vae, config.hidden_size)
    scale, depth = 2 ** (len(vae.config.block_out_channels) - 1), depth_factor(unet)
    size = size or (unet.config.sample_size * scale, unet.config.sample_size * scale)
    check_size(size, scale * depth)
    inside = topology(unet)
    ends: dict[str, nn.Module] = {TEXT: TextEncoder(text), VAE_DECODER: VaeDecoder(vae), VAE_ENCODER: VaeEncoder(vae)}
    first, *last = (Unit(name=n, kind=n, inputs=(i,)) for n, i in zip(ends, (TOKENS, LATENTS, IMAGE), strict=True))
    modules = ends | {unit.name: unit_module(unet, unit.name) for unit in inside}
    sizes = {"height": size[0] // scale, "width": size[1] // scale}
    inputs = _inputs(unet, vae, config.max_position_embeddings, scale)
    units, features = measure((first, *inside, *last), modules, inputs, sizes)
    return Graph(
        units=tuple(units),
        modules=modules,
        features=features,
        depth=depth,
        vae_scale=scale,
        latent_channels=unet.config.in_channels,
        text_length=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        size=size,
    )


def _inputs(unet: UNet2DConditionModel, vae: AutoencoderKL, text_length: int, scale: int) -> dict[str, Feature]:
    """The features that no unit makes."""
    picture = vae.config.in_channels, f"{scale}*height", f"{scale}*width"
    return {
        TOKENS: Feature(dtype="int64", shape=("batch", text_length)),
        SAMPLE: Feature(dtype="float32", shape=("batch", unet.config.in_channels, "height", "width")),
        TIMESTEP: Feature(dtype="float32", shape=(1,)),
        LATENTS: Feature(dtype="float32", shape=("images", vae.config.latent_channels, "height", "width")),
        IMAGE: Feature(dtype="float32", shape=("images", *picture)),
    }


def check_size(size: tuple[int, int], multiple: int) -> None:
    """Raise BuildError unless the UNet's depth divides a picture size (height, width) in pixels."""
    if any(side < multiple or side % multiple for side in size):
        raise BuildError(f"size {size[0]}x{size[1]}: height and width must be multiples of {multiple} pixels for this UNet")


def _check_fit(checkpoint: Checkpoint, unet: UNet2DConditionModel, vae: AutoencoderKL, text_width: int) -> None:
    name, wanted = checkpoint.name, unet.config.cross_attention_dim
    if wanted != text_width:
        raise SourceError(f"source {name}: the UNet reads text of width {wanted}, the text encoder makes {text_width}")
    channels, latent = unet.config.in_channels, vae.config.latent_channels
    if channels != latent:
        raise SourceError(
            f"source {name}: the UNet reads {channels} channels, the VAE makes {latent}:  "
            "inpainting and depth UNets are not supported"
        )
