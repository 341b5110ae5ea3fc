"""Both ends of the graph around the UNet, as torch modules: the text encoder and the two halves of the VAE."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from exporter.errors import BuildError
from tuning.checkpoints.part_loaders import is_tiny

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = ["TextEncoder", "VaeDecoder", "VaeEncoder", "leave_out_layers"]

_LOG_VARIANCE = (-30.0, 20.0)
"""Bounds that diffusers' DiagonalGaussianDistribution sets."""


class TextEncoder(nn.Module):
    """Token numbers -> the text encoder's last hidden state, after its final norm."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        # The model has a buffer of positions that belongs to no checkpoint: where weights are loaded by name, it is empty.
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        result: Tensor = self.model(input_ids=tokens, position_ids=positions).last_hidden_state
        return result


def leave_out_layers(model: Any, count: int) -> None:
    """Take the last layers out of a text encoder, so that its final norm follows an earlier one: ``clip_skip`` of diffusers.

    Raises:
        BuildError: it has fewer.
    """
    layers = getattr(model, "text_model", model).encoder.layers
    if count > len(layers):
        raise BuildError(f"clip skip {count}: the text encoder has {len(layers)} layers; leave out as many at most")
    del layers[len(layers) - count :]


class VaeDecoder(nn.Module):
    """Latents as the UNet has them -> picture in [-1, 1], float32; the VAE's scaling is done here."""

    def __init__(self, vae: "AutoencoderKL") -> None:
        super().__init__()
        self.post_quant, self.decoder = getattr(vae, "post_quant_conv", None), vae.decoder
        self.scaling = float(vae.config.scaling_factor)

    def forward(self, latents: Tensor) -> Tensor:
        x = (latents / self.scaling).to(next(self.decoder.parameters()).dtype)
        if self.post_quant is not None:
            x = self.post_quant(x)
        result: Tensor = self.decoder(x)
        return result.float()


class VaeEncoder(nn.Module):
    """Picture in [-1, 1] -> the normal distribution of its latents as the UNet has them: means, then standard deviations.

    The result has twice the latents' channels and is float32. Samples are drawn outside: an engine has no seeds. Of an
    AutoencoderTiny it is the latents themselves, which are no distribution.
    """

    def __init__(self, vae: "AutoencoderKL") -> None:
        super().__init__()
        self.quant, self.encoder, self.is_tiny = getattr(vae, "quant_conv", None), vae.encoder, is_tiny(vae)
        self.scaling = float(vae.config.scaling_factor)

    def forward(self, image: Tensor) -> Tensor:
        x = self.encoder(image.to(next(self.encoder.parameters()).dtype))
        if self.is_tiny:
            latents: Tensor = self.scaling * x.float()
            return latents
        if self.quant is not None:
            x = self.quant(x)
        mean, log_variance = x.float().chunk(2, dim=1)
        deviation = torch.exp(log_variance.clamp(*_LOG_VARIANCE) / 2)
        return self.scaling * torch.cat([mean, deviation], dim=1)
