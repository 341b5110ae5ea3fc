"""Tuning: a UNet in, a UNet out. Heavy modules load when their names are first used."""

from typing import TYPE_CHECKING, Any

from tuning.errors import TuningError
from tuning.recipes import RECIPES, LossWeights, Recipe, recipe
from tuning.units import unit_modules

if TYPE_CHECKING:
    from tuning.assembly import assemble

__all__ = ["RECIPES", "LossWeights", "Recipe", "TuningError", "assemble", "recipe", "unit_modules"]


def __getattr__(name: str) -> Any:
    if name == "assemble":
        from tuning.assembly import assemble

        return assemble
    raise AttributeError(f"module 'tuning' has no attribute {name!r}")
