"""Tuning: a UNet in, a UNet out. Heavy modules load when their names are first used."""

from typing import TYPE_CHECKING

from engines.lazy import lazy_names

if TYPE_CHECKING:
    from tuning.checkpoints.folder import load_unet
    from tuning.errors import TuningError
    from tuning.surgery.assembly import assemble
    from tuning.surgery.recipes import RECIPES, Experts, LossWeights, Recipe, recipe
    from tuning.surgery.units import unit_modules
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "tuning.checkpoints.folder": ("load_unet",),
            "tuning.errors": ("TuningError",),
            "tuning.surgery.assembly": ("assemble",),
            "tuning.surgery.recipes": ("RECIPES", "Experts", "LossWeights", "Recipe", "recipe"),
            "tuning.surgery.units": ("unit_modules",),
        },
    )

__all__ = ["RECIPES", "Experts", "LossWeights", "Recipe", "TuningError", "assemble", "load_unet", "recipe", "unit_modules"]
