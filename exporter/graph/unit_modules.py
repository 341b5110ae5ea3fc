"""One torch module per unit, all with the same signature: features in the order of ``Unit.inputs``, one feature out.

ResNets and transformers are two units each: the residual branch, and the sum of the (projected) input and the branch. Skipping a
unit while its input flows on is then nothing but inheriting its branch.

Latents, timestep and prediction are float32 whatever the UNet's dtype: the schedulers' arithmetic stays exact, and an fp16
graph is cast once on each side. The time embedding is computed in its own weights' dtype, float32 in every bundle: it is small,
and everything reads it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engines.bundle.manifest import Unit
from engines.bundle.names import ATTENTION, BRANCH, NOISE, TIME
from exporter.graph.attention_parts import PART_PATHS, part_module, picture, tokens
from exporter.graph.condconv import FORM, Form, exported
from tuning.surgery.condconv import CondConvResnet
from tuning.surgery.units import unit_modules

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["CondConvBranch", "SegmentModule", "kind_of", "paths_of", "unit_module"]


class Time(nn.Module):
    """Timestep (1,) -> time embedding (1, channels)."""

    def __init__(self, unet: "UNet2DConditionModel") -> None:
        super().__init__()
        self.projection, self.embedding = unet.time_proj, unet.time_embedding
        self.dtype = unet.conv_in.weight.dtype

    def forward(self, timestep: Tensor) -> Tensor:
        result: Tensor = self.embedding(self.projection(timestep).to(self.embedding.linear_1.weight.dtype))
        return result.to(self.dtype)


class Stem(nn.Module):
    """Latents (batch, channels, height, width) -> first feature, at the same resolution."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, sample: Tensor) -> Tensor:
        result: Tensor = self.convolution(sample.to(self.convolution.weight.dtype))
        return result


class ResnetBranch(nn.Module):
    """Feature, on the way up a skip feature, and time embedding -> what the ResNet adds to its (projected) input."""

    def __init__(self, resnet: Any) -> None:
        super().__init__()
        self.norm1, self.conv1, self.time = resnet.norm1, resnet.conv1, resnet.time_emb_proj
        self.norm2, self.conv2, self.activation = resnet.norm2, resnet.conv2, resnet.nonlinearity

    def forward(self, *features: Tensor) -> Tensor:
        *inputs, time = features
        x = self.conv1(self.activation(self.norm1(_joined(inputs))))
        x = x + self.time(self.activation(time))[:, :, None, None]
        result: Tensor = self.conv2(self.activation(self.norm2(x)))
        return result


class CondConvBranch(ResnetBranch):
    """The branch of a ResNet with conditional convolutions, which read the time embedding too; in and out as ``ResnetBranch``."""

    def __init__(self, resnet: CondConvResnet, form: Form = FORM) -> None:
        super().__init__(resnet)
        self.conv1, self.conv2 = exported(resnet.conv1, form), exported(resnet.conv2, form)

    def forward(self, *features: Tensor) -> Tensor:
        *inputs, time = features
        time = self.activation(time)
        x = self.conv1(self.activation(self.norm1(_joined(inputs))), time)
        x = x + self.time(time)[:, :, None, None]
        result: Tensor = self.conv2(self.activation(self.norm2(x)), time)
        return result


class ResnetSum(nn.Module):
    """Feature, on the way up a skip feature, and the ResNet's branch -> feature."""

    def __init__(self, resnet: Any) -> None:
        super().__init__()
        self.shortcut = resnet.conv_shortcut

    def forward(self, *features: Tensor) -> Tensor:
        *inputs, branch = features
        x = _joined(inputs)
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(x)
        return shortcut + branch


class AttentionBranch(nn.Module):
    """Feature and text (batch, tokens, width) -> what the transformer adds to its input."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.norm, self.before, self.after = transformer.norm, transformer.proj_in, transformer.proj_out
        self.blocks, self.linear = transformer.transformer_blocks, bool(transformer.use_linear_projection)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = self.norm(x)
        x = self.before(tokens(x)) if self.linear else tokens(self.before(x))
        for block in self.blocks:
            x = block(x, encoder_hidden_states=text)
        result: Tensor = picture(self.after(x), height, width) if self.linear else self.after(picture(x, height, width))
        return result


class AttentionSum(nn.Module):
    """Feature and the transformer's branch -> feature."""

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch


def _joined(inputs: Sequence[Tensor]) -> Tensor:
    return inputs[0] if len(inputs) == 1 else torch.cat(list(inputs), dim=1)


class Head(nn.Module):
    """Last feature -> prediction (batch, channels, height, width), float32."""

    def __init__(self, unet: "UNet2DConditionModel") -> None:
        super().__init__()
        self.norm, self.activation, self.convolution = unet.conv_norm_out, unet.conv_act, unet.conv_out

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = self.activation(self.norm(x))
        result: Tensor = self.convolution(x)
        return result.float()


def paths_of(unet: "UNet2DConditionModel", name: str, in_parts: bool = False) -> tuple[str, ...]:
    """The UNet's submodules that the unit of that name is made of; ``in_parts`` where transformers are cut."""
    if name == TIME:
        return ("time_embedding",)
    if name == NOISE:
        return "conv_norm_out", "conv_out"
    transformer, part = _part_of(name)
    if in_parts and part:
        path = unit_modules(unet)[transformer]
        return tuple(f"{path}.{inside}" for inside in PART_PATHS[part])
    return (unit_modules(unet)[name.removesuffix(BRANCH)],)


def unit_module(unet: "UNet2DConditionModel", name: str, in_parts: bool = False) -> nn.Module:
    """The module that computes the unit of that name; it shares the UNet's weights.

    Args:
        unet: whose unit.
        name: of the unit.
        in_parts: whether the UNet's transformers are cut into parts.

    Raises:
        SourceError: a transformer cannot be cut.
    """
    if name == TIME:
        return Time(unet)
    if name == NOISE:
        return Head(unet)
    transformer, part = _part_of(name)
    if in_parts and part:
        return part_module(unet.get_submodule(unit_modules(unet)[transformer]), transformer, part)
    is_branch = name.endswith(BRANCH)
    module: nn.Module = unet.get_submodule(*paths_of(unet, name))
    kind = kind_of(name.removesuffix(BRANCH))
    if isinstance(module, nn.Conv2d):
        return Stem(module)
    if kind == "resnet":
        if not is_branch:
            return ResnetSum(module)
        return CondConvBranch(module) if isinstance(module, CondConvResnet) else ResnetBranch(module)
    if kind == "attention":
        return AttentionBranch(module) if is_branch else AttentionSum()
    return module


def _part_of(name: str) -> tuple[str, str]:
    """The transformer that a unit is inside of, and which part of it; nothing for other units, and for its sum."""
    before, _, part = name.rpartition(f"{ATTENTION}.")
    return (f"{before}{ATTENTION}", part) if before else ("", "")


def kind_of(name: str) -> str:
    """The kind of a unit, as its name ends: resnet, attention, sampler, branch, stem, time or head."""
    return name.rsplit(".", maxsplit=1)[-1]


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
