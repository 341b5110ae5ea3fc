"""A checkpoint's models without their weights, and modules of their units with them: a few at a time, so that a build of a large
UNet never holds the whole of it.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engines.bundle.names import TEXT, VAE_DECODER, VAE_ENCODER
from exporter.graph.attention_parts import asks_for_parts
from exporter.graph.checkpoint import MODELS
from exporter.graph.text_vae import TextEncoder, VaeDecoder, VaeEncoder, leave_out_layers
from exporter.graph.topology import topology
from exporter.graph.unit_modules import paths_of, unit_module
from runtime.plans.plan import Plan

if TYPE_CHECKING:
    from exporter.graph.checkpoint import Checkpoint

__all__ = ["Components", "part_of"]

_TEXT_AND_VAE = {TEXT: ("text_encoder", TextEncoder), VAE_DECODER: ("vae", VaeDecoder), VAE_ENCODER: ("vae", VaeEncoder)}
"""The units outside the UNet: the checkpoint's part that they belong to, and their module."""
_VAE_PATHS = {VAE_DECODER: ("post_quant_conv", "decoder"), VAE_ENCODER: ("quant_conv", "encoder")}


class Components:
    """The UNet, text encoder and VAE of a checkpoint on the meta device.

    Args:
        checkpoint: from ``open_source``.
        variant: which UNet.
        dtype: of the weights; those of the time embedding stay float32.
        vae_dtype: of the VAE's weights, by default the same.
        clip_skip: how many of the text encoder's last layers are left out.
        plans: where one names a part of a transformer, transformers are cut into parts.

    Raises:
        BuildError: the text encoder has fewer layers.
        SourceError: the UNet is of another family.
    """

    def __init__(
        self,
        checkpoint: "Checkpoint",
        variant: str,
        dtype: torch.dtype,
        vae_dtype: torch.dtype | None = None,
        clip_skip: int = 0,
        plans: Sequence[Plan] = (),
    ) -> None:
        self.checkpoint, self._variant, self.clip_skip = checkpoint, variant, clip_skip
        self.models = {part: checkpoint.skeleton(part, variant) for part in MODELS}
        leave_out_layers(self.models["text_encoder"], clip_skip)
        self.in_parts = bool(plans) and asks_for_parts(plans, [unit.name for unit in topology(self.models["unet"])])
        for part, model in self.models.items():
            wanted = (vae_dtype or dtype) if part == "vae" else dtype
            nn.Module.to(model, wanted)  # diffusers' own warns of modules kept in float32, of which there are none here
        self.models["unet"].get_submodule("time_embedding").float()

    def modules(self, units: Iterable[str]) -> dict[str, nn.Module]:
        """The module of each unit, on the meta device."""
        return {unit: self._module(self.models, unit) for unit in units}

    def changes(self, units: Iterable[str]) -> list[str]:
        """The changes that are fused into the weights of units, each with a hash. Raises SourceError as ``load`` does."""
        found: list[str] = []
        for unit in units if self.checkpoint.loras else ():
            part = part_of(unit)
            names = [name for name in self.models[part].state_dict() if name.startswith(self._paths(unit))]
            found += self.checkpoint.weights(part, self._variant).changes(names)
        return found

    def load(self, units: Iterable[str]) -> dict[str, nn.Module]:
        """The module of each unit with its weights, on the CPU and in evaluation mode; nobody else keeps them.

        Raises:
            SourceError: weights are missing or cannot be read.
        """
        units = tuple(units)
        used = {part_of(unit) for unit in units}
        models = {}
        for part in used:
            paths = [path for unit in units if part_of(unit) == part for path in self._paths(unit)]
            models[part] = _copied(self.models[part], paths)
            self._fill(part, models[part], paths)
        return {unit: self._module(models, unit).eval() for unit in units}

    def _fill(self, part: str, model: nn.Module, paths: Iterable[str]) -> None:
        weights, state = self.checkpoint.weights(part, self._variant), model.state_dict()
        wanted = {name: tensor for name, tensor in state.items() if any(name.startswith(path) for path in paths)}
        taken: dict[str, Tensor] = {}
        for dtype in {tensor.dtype for tensor in wanted.values()}:
            taken |= weights.take([name for name, tensor in wanted.items() if tensor.dtype == dtype], dtype)
        model.load_state_dict(taken, strict=False, assign=True)

    def _paths(self, unit: str) -> tuple[str, ...]:
        """The prefixes of the names of the unit's weights."""
        if unit == TEXT:
            return ("",)
        inside = _VAE_PATHS[unit] if unit in _VAE_PATHS else paths_of(self.models["unet"], unit, self.in_parts)
        return tuple(f"{path}." for path in inside)

    def _module(self, models: Mapping[str, nn.Module], unit: str) -> nn.Module:
        if unit in _TEXT_AND_VAE:
            part, kind = _TEXT_AND_VAE[unit]
            return kind(models[part])
        return unit_module(models["unet"], unit, self.in_parts)


def _copied(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """A copy of a model of which only what these paths lead to is copied; the rest is the model's own."""
    rest = {id(module): module for name, module in model.named_modules() if not _is_on(f"{name}.", paths)}
    return copy.deepcopy(model, rest)


def _is_on(name: str, paths: Sequence[str]) -> bool:
    """Whether a module leads to what lies at one of these paths, or is in it."""
    return name == "." or any(name.startswith(path) or path.startswith(name) for path in paths)


def part_of(unit: str) -> str:
    """The checkpoint's part that a unit belongs to."""
    return _TEXT_AND_VAE[unit][0] if unit in _TEXT_AND_VAE else "unet"
