"""Where an assembled UNet gets conditional convolutions, and which kernels their experts start from."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch
from torch import nn

from engines.bundle.names import ATTENTION
from tuning.errors import TuningError
from tuning.surgery.changes import Changes, PlacedExperts, apply_changes, changes_of
from tuning.surgery.pruning import removed_units
from tuning.surgery.recipes import Recipe
from tuning.surgery.units import unit_modules

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["add_experts"]

_CONVOLUTIONS = ("conv1", "conv2")
_SEED = 0


def add_experts(
    teacher: UNet2DConditionModel,
    student: UNet2DConditionModel,
    recipe: Recipe,
    removed: Collection[str],
    origin: Callable[[str], str],
) -> None:
    """Makes convolutions of `student` conditional as `recipe.experts` says; its output stays exactly what it was.

    The first expert of each is the convolution that was there. The others are kernels of the removed ResNets of the same
    block, where their shape is the same, and else random.

    Args:
        teacher: the UNet that the student was made from.
        student: changed in place.
        recipe: with experts.
        removed: the teacher's units that the student lacks.
        origin: the teacher's unit that a unit of the student comes from.

    Raises:
        TuningError: a glob names no ResNet, or there is none beside a removed unit.
    """
    assert recipe.experts is not None
    names = _placed(student, recipe, removed, origin)
    changes = Changes(
        removed=changes_of(student).removed,
        experts=PlacedExperts(resnets=tuple(names), count=recipe.experts.count, router=recipe.experts.router),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        apply_changes(student, changes)
    theirs, ours = unit_modules(teacher), unit_modules(student)
    for name in names:
        gone = [teacher.get_submodule(theirs[unit]) for unit in _nearest(origin(name), removed)]
        for convolution in _CONVOLUTIONS:
            _inherit(student.get_submodule(f"{ours[name]}.{convolution}"), convolution, gone)


def _placed(student: nn.Module, recipe: Recipe, removed: Collection[str], origin: Callable[[str], str]) -> list[str]:
    """The student's ResNets that the recipe's globs name, or those that lost a neighbour."""
    assert recipe.experts is not None
    resnets = [unit for unit in unit_modules(student) if unit.endswith(".resnet")]
    if not recipe.experts.units:
        lonely = [unit for unit in resnets if _lost_a_neighbour(origin(unit), removed)]
        if not lonely:
            raise TuningError(
                f"recipe {recipe.name}: experts go beside removed layers, and none has a neighbour that stays: name ResNets "
                f"in experts.units, of {', '.join(resnets)}"
            )
        return lonely
    chosen: set[str] = set()
    for glob in recipe.experts.units:
        named = removed_units(student, Recipe(name=f"{recipe.name}, experts.units", remove=(glob,)))
        if not named & set(resnets):
            raise TuningError(
                f"recipe {recipe.name}: experts.units has {glob!r}, which names no ResNet of the assembled UNet; it has "
                f"{', '.join(resnets)}"
            )
        chosen |= named
    return [unit for unit in resnets if unit in chosen]


def _layer(resnet: str) -> tuple[str, int]:
    """The layers' common name, "down.0.layer", and the layer's number."""
    layers, number, _ = resnet.rsplit(".", 2)
    return layers, int(number)


def _lost_a_neighbour(resnet: str, removed: Collection[str]) -> bool:
    """Whether the layer before or after was removed, or the layer's own attention."""
    layers, number = _layer(resnet)
    beside = (f"{layers}.{number - 1}.resnet", f"{layers}.{number + 1}.resnet", f"{layers}.{number}{ATTENTION}")
    return any(unit in removed for unit in beside)


def _nearest(resnet: str, removed: Collection[str]) -> list[str]:
    """Removed ResNets of the same block, the nearest first."""
    layers, number = _layer(resnet)
    gone = [unit for unit in removed if unit.endswith(".resnet") and _layer(unit)[0] == layers]
    return sorted(gone, key=lambda unit: (abs(_layer(unit)[1] - number), unit))


def _inherit(conditional: nn.Module, name: str, gone: list[nn.Module]) -> None:
    """Copies the removed ResNets' kernels over random experts: first those of the convolution of that name."""
    first, *experts = conditional.kernels  # type: ignore[misc]
    names = sorted(_CONVOLUTIONS, key=lambda other: other != name)
    kernels = [resnet.get_submodule(other).weight for other in names for resnet in gone]
    fitting = [kernel for kernel in kernels if kernel.shape == first.shape]
    with torch.no_grad():
        for expert, kernel in zip(experts, fitting, strict=False):
            expert.copy_(kernel)
