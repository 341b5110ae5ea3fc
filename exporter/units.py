"""One torch module per unit, all with the same signature: features in the order of ``Unit.inputs``, one feature out.

Latents, timestep and prediction are float32 whatever the UNet's dtype: the schedulers' arithmetic stays exact, and an fp16
graph is cast once on each side.
"""

from collections.abc import Mapping, Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from engines.manifest import Unit
from tuning.units import unit_modules

__all__ = ["SegmentModule", "unit_module"]


class Time(nn.Module):
    """Timestep (1,) -> time embedding (1, channels)."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.projection, self.embedding = unet.time_proj, unet.time_embedding

    def forward(self, timestep: Tensor) -> Tensor:
        result: Tensor = self.embedding(self.projection(timestep).to(self.embedding.linear_1.weight.dtype))
        return result


class Stem(nn.Module):
    """Latents (batch, channels, height, width) -> first feature, at the same resolution."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, sample: Tensor) -> Tensor:
        result: Tensor = self.convolution(sample.to(self.convolution.weight.dtype))
        return result


class Resnet(nn.Module):
    """Feature, on the way up a skip feature, and time embedding -> feature."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        *skips, time = others
        result: Tensor = self.block(torch.cat([x, *skips], dim=1) if skips else x, time)
        return result


class Attention(nn.Module):
    """Feature and text (batch, tokens, width) -> feature."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        result: Tensor = self.transformer(x, encoder_hidden_states=text, return_dict=False)[0]
        return result


class Head(nn.Module):
    """Last feature -> prediction (batch, channels, height, width), float32."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.norm, self.activation, self.convolution = unet.conv_norm_out, unet.conv_act, unet.conv_out

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = self.activation(self.norm(x))
        result: Tensor = self.convolution(x)
        return result.float()


def unit_module(unet: UNet2DConditionModel, name: str) -> nn.Module:
    """The module that computes the unit of that name; it shares the UNet's weights."""
    if name == "time":
        return Time(unet)
    if name == "head":
        return Head(unet)
    module = unet.get_submodule(unit_modules(unet)[name])
    kind = name.rsplit(".", maxsplit=1)[-1]
    if kind == "stem":
        return Stem(module)
    if kind == "resnet":
        return Resnet(module)
    return Attention(module) if kind == "attention" else module


class SegmentModule(nn.Module):
    """Units run one after another: the segment's inputs in, its outputs out, both in the order that the segment names."""

    def __init__(
        self, units: Sequence[Unit], modules: Mapping[str, nn.Module], inputs: Sequence[str], outputs: Sequence[str]
    ) -> None:
        super().__init__()
        self.units = tuple(units)
        self.steps = nn.ModuleList(modules[unit.name] for unit in units)
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        features = dict(zip(self.inputs, tensors, strict=True))
        for unit, module in zip(self.units, self.steps, strict=True):
            features[unit.name] = module(*(features[name] for name in unit.inputs))
        return tuple(features[name] for name in self.outputs)
