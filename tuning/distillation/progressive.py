"""Progressive assembly: a recipe's removals in portions, with distillation after each, in place of all at once."""

import dataclasses

from torch import nn

from tuning.surgery.pruning import removed_units, resolve_removals
from tuning.surgery.recipes import Recipe
from tuning.surgery.units import unit_modules
from tuning.training.loop import LoopSettings

__all__ = ["next_removal", "share_of", "stages_of"]


def stages_of(recipe: Recipe) -> int:
    """How many portions the recipe's removals come in."""
    return len(recipe.portions) or 1


def next_removal(original: nn.Module, student: nn.Module, recipe: Recipe, stage: int) -> Recipe:
    """The removal of portion number `stage` (from 0) from the student that the portions before it left.

    A recipe's globs are names in the original UNet; the result has the student's names for the same units.

    Raises:
        TuningError: the portions up to this one are no removal that leaves a whole UNet.
    """
    pruning = resolve_removals(original, _up_to(recipe, stage))
    now = removed_units(original, _up_to(recipe, stage + 1))
    gone = tuple(unit for unit in unit_modules(student) if pruning.origin(unit) in now)
    experts = recipe.experts if stages_of(recipe) == 1 else None
    return Recipe(name=recipe.name, remove=gone, experts=experts, loss=recipe.loss)


def share_of(settings: LoopSettings, stage: int, stages: int) -> LoopSettings:
    """The settings with an equal share of each bound and of the warm-up, so that all stages together cost what one would."""
    if stages == 1:
        return settings
    steps = settings.steps and max(1, _part(settings.steps, stage, stages))
    minutes, wall = (bound and bound / stages for bound in (settings.minutes, settings.wall_minutes))
    warmup = _part(settings.warmup, stage, stages)
    return dataclasses.replace(settings, steps=steps, minutes=minutes, wall_minutes=wall, warmup=warmup)


def _part(number: int, stage: int, stages: int) -> int:
    """A stage's part of a number, such that all parts add up to it."""
    return number * (stage + 1) // stages - number * stage // stages


def _up_to(recipe: Recipe, stage: int) -> Recipe:
    """The recipe of the first `stage` portions at once."""
    globs = sum(recipe.portions[:stage]) if recipe.portions else stage * len(recipe.remove)
    return Recipe(name=recipe.name, remove=recipe.remove[:globs])
