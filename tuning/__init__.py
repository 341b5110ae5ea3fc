"""Tuning: a UNet in, a UNet out. Heavy modules load when their names are first used."""

from typing import TYPE_CHECKING, Any

from tuning.errors import TuningError
from tuning.surgery.recipes import RECIPES, Experts, LossWeights, Recipe, recipe
from tuning.surgery.units import unit_modules

if TYPE_CHECKING:
    from tuning.checkpoints.folder import load_unet
    from tuning.surgery.assembly import assemble

__all__ = ["RECIPES", "Experts", "LossWeights", "Recipe", "TuningError", "assemble", "load_unet", "recipe", "unit_modules"]


def __getattr__(name: str) -> Any:
    if name == "assemble":
        from tuning.surgery.assembly import assemble

        return assemble
    if name == "load_unet":
        from tuning.checkpoints.folder import load_unet

        return load_unet
    raise AttributeError(f"module 'tuning' has no attribute {name!r}")
