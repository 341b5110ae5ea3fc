"""Model assembly: a UNet and a recipe in, a smaller UNet with the kept weights out.

The first half of A-SDM's tuning (arXiv 2406.00210). What differs from it: the removed units are named by a recipe, and the
result is an ordinary diffusers UNet2DConditionModel, its configuration edited, whatever the widths and depths; only attentions
that went alone are noted beside the configuration (see `tuning.surgery.changes`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engines.bundle.names import ATTENTION
from tuning.errors import TuningError
from tuning.surgery.changes import KEY, Changes, apply_changes, changes_of
from tuning.surgery.experts import add_experts
from tuning.surgery.meta import on_meta
from tuning.surgery.pruning import PruningPlan, removed_units, resolve_removals
from tuning.surgery.recipes import Recipe
from tuning.surgery.units import unit_modules

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["assemble", "origins", "removed_units"]

_PER_STAGE = (
    "block_out_channels", "down_block_types", "only_cross_attention", "cross_attention_dim", "transformer_layers_per_block",
    "attention_head_dim", "num_attention_heads",
)  # fmt: skip
_PER_STAGE_UP = ("up_block_types", "reverse_transformer_layers_per_block")


def assemble(unet: UNet2DConditionModel, recipe: Recipe, *, share: bool = False) -> UNet2DConditionModel:
    """A new UNet without the units that the recipe removes; every kept weight is the given UNet's, which stays as it is.

    With `share` the kept weights are no copies: for measuring, where the new UNet is not trained.

    Where whole innermost stages go, up block i of the new UNet is block i + (stages removed) of the given one, and the last
    down block that is left loses its sampler.

    Raises TuningError for a glob that names nothing, a ResNet that would go without its attention, a skip connection left
    without its other end, everything at a resolution that is not the innermost, kept weights that don't fit their new place,
    experts whose place is no ResNet, or a UNet that has experts already.
    """
    if changes_of(unet).experts is not None:
        raise TuningError(
            f"recipe {recipe.name}: this UNet has conditional convolutions already; assemble the UNet that it was made from"
        )
    kept = resolve_removals(unet, recipe)
    student = _without_weights(unet, kept, recipe.name)
    source: dict[str, Tensor] = unet.state_dict()
    names = _origins(unet, student, kept, recipe.name)
    state = {
        name: source[origin] if share else source[origin].clone(memory_format=torch.contiguous_format)
        for name, origin in names.items()
    }
    student.load_state_dict(state, assign=True)
    if recipe.experts is not None:
        add_experts(unet, student, recipe, removed_units(unet, recipe), kept.origin)
    return student.train(unet.training)


def origins(unet: UNet2DConditionModel, recipe: Recipe) -> dict[str, str]:
    """Names of the assembled UNet's weights -> the given UNet's names of them; that can be on the meta device.

    Raises TuningError as `assemble` does. A recipe with experts makes some of its weights, which come from no single one.
    """
    kept = resolve_removals(unet, recipe)
    return _origins(unet, _without_weights(unet, kept, recipe.name), kept, recipe.name)


def _without_weights(unet: UNet2DConditionModel, kept: PruningPlan, name: str) -> UNet2DConditionModel:
    """The student on the meta device: its weights come from the given UNet, random ones would only cost time and memory."""
    from diffusers import UNet2DConditionModel

    config, changes = _configuration(unet, kept, name)
    with on_meta():
        student: UNet2DConditionModel = UNet2DConditionModel.from_config(config)
        apply_changes(student, changes)
    return student


def _configuration(unet: UNet2DConditionModel, kept: PruningPlan, name: str) -> tuple[dict[str, Any], Changes]:
    """The student's configuration, and what no configuration says."""
    # diffusers would put defaults back for the names in _use_default_values.
    config: dict[str, Any] = {k: v for k, v in unet.config.items() if k not in ("_use_default_values", KEY)}
    if any(isinstance(n, list | tuple) for n in _tuple(config["transformer_layers_per_block"])):
        raise TuningError(f"recipe {name}: transformers of unlike depth in one block are not of the SD 1.x/2.x family")
    left = len(unet.down_blocks) - kept.cut
    config |= {key: config[key][:left] for key in _PER_STAGE if isinstance(config[key], list | tuple)}
    config |= {key: config[key][kept.cut :] for key in _PER_STAGE_UP if isinstance(config[key], list | tuple)}
    per_block = tuple(len(kept.layers[f"down.{i}"]) for i in range(left))
    config["layers_per_block"] = per_block[0] if len(set(per_block)) == 1 else per_block
    if not kept.mid:
        config["mid_block_type"] = None
    bare = _without_attention(unet, kept)
    for way in ("down", "up"):
        types = list(config[f"{way}_block_types"])
        for i in range(left):
            layers = {f"{way}.{i}.layer.{n}" for n in range(per_block[i] if way == "down" else per_block[left - 1 - i] + 1)}
            if layers <= bare:
                types[i] = types[i].replace("CrossAttn", "")
                bare -= layers
        config[f"{way}_block_types"] = tuple(types)
    return config, Changes(removed=tuple(sorted(f"{layer}{ATTENTION}" for layer in bare)))


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _without_attention(unet: UNet2DConditionModel, kept: PruningPlan) -> set[str]:
    """The student's layers that have lost their attention, now or in an earlier assembly, as the student calls them."""
    theirs = unit_modules(unet)
    bare = set()
    left = len(unet.down_blocks) - kept.cut
    blocks = {f"down.{i}": (f"down.{i}", unet.down_blocks[i]) for i in range(left)}
    blocks |= {f"up.{i}": (f"up.{i + kept.cut}", unet.up_blocks[i + kept.cut]) for i in range(left)}
    for ours, (block, module) in blocks.items():
        for i, layer in enumerate(kept.layers[block]):
            name = f"{block}.layer.{layer}"
            if hasattr(module, "attentions") and (name in kept.bare or f"{name}{ATTENTION}" not in theirs):
                bare.add(f"{ours}.layer.{i}")
    for i, _ in enumerate(getattr(unet.mid_block, "attentions", None) or [] if kept.mid else []):
        # A mid block without attention (UNetMidBlock2D) holds None in its place.
        if f"mid.layer.{i}" in kept.bare or f"mid.layer.{i}{ATTENTION}" not in theirs:
            bare.add(f"mid.layer.{i}")
    return bare


def _origins(teacher: nn.Module, student: nn.Module, kept: PruningPlan, name: str) -> dict[str, str]:
    """Names in the student's state -> names in the teacher's. Raises TuningError where a weight does not fit its new place."""
    source: dict[str, Tensor] = teacher.state_dict()
    theirs, ours = unit_modules(teacher), unit_modules(student)
    renamed = {path: theirs[kept.origin(unit)] for unit, path in ours.items()}
    found: dict[str, str] = {}
    for key, value in student.state_dict().items():
        path = next((p for p in renamed if key.startswith(f"{p}.")), None)
        origin = key if path is None else renamed[path] + key[len(path) :]
        if origin not in source or source[origin].shape != value.shape:
            raise TuningError(f"recipe {name}: {_misfit(origin, source, value, kept)}")
        found[key] = origin
    _check_heads(teacher, student, renamed, name)
    return found


def _misfit(origin: str, source: dict[str, Tensor], value: Tensor, kept: PruningPlan) -> str:
    shape = f"is {tuple(source[origin].shape)}" if origin in source else "does not exist"
    inner = ", or keep the innermost stages, whose widths are others" if kept.cut else ""
    return (
        f"{origin} {shape} and its new place needs {tuple(value.shape)}: keep the first and the last layer of every block, "
        f"whose inputs have widths of their own{inner}"
    )


def _check_heads(teacher: nn.Module, student: nn.Module, renamed: dict[str, str], name: str) -> None:
    """Weights of one shape can be cut into heads in several ways; the mid block reads the last stage's number of heads."""
    for ours, theirs in renamed.items():
        heads, new = (getattr(m.get_submodule(p), "num_attention_heads", 0) for m, p in ((teacher, theirs), (student, ours)))
        if heads != new:
            raise TuningError(f"recipe {name}: {theirs} has {heads} heads and its new place gives it {new}; remove it as well")
