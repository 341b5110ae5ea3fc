"""Recipes: what an assembled UNet leaves out and how it is distilled, as frozen data with a version."""

import errno
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from engines.support.files import check_regular
from engines.support.records import Name, Record, explain
from tuning.errors import TuningError

__all__ = ["RECIPES", "Experts", "LossWeights", "Recipe", "recipe"]


_MOST = 1000
"""Entries of a list; Stable Diffusion's UNet has some 50 units."""
_LARGEST = 1 << 20
"""Bytes of a recipe's file."""


class LossWeights(Record):
    """Weights of the distillation losses, 1 for each as in BK-SDM (arXiv 2305.15798); features are errors in shares."""

    noise: float = Field(1.0, ge=0, allow_inf_nan=False)
    output: float = Field(1.0, ge=0, allow_inf_nan=False)
    features: float = Field(1.0, ge=0, allow_inf_nan=False)


class Experts(Record):
    """Conditional convolutions (CondConv, arXiv 1904.04971): `count` kernels each, mixed by what the router reads.

    `units` are globs over the assembled UNet's ResNets; empty means those in layers whose neighbour was removed.
    """

    units: tuple[Name, ...] = Field((), max_length=_MOST)
    count: int = Field(4, ge=2, le=16)
    router: Literal["timestep", "features"] = "timestep"


class Recipe(Record):
    """A UNet's surgery by names.

    `remove` holds globs over units ("down.0.layer.1.attention"), layers ("down.0.layer.1") or blocks ("mid"). A block's
    number may count from the end, so that "up.-1" is the outermost up block of any UNet.

    With `portions`, distillation removes so many of the globs at a time, in their order, and trains in between; assembly
    alone removes all at once.
    """

    version: Literal[1] = 1
    name: Name = Field(min_length=1)
    remove: tuple[Name, ...] = Field((), max_length=_MOST)
    portions: tuple[int, ...] = Field((), max_length=_MOST)
    experts: Experts | None = None
    loss: LossWeights = LossWeights()

    @model_validator(mode="after")
    def _portions_add_up(self) -> "Recipe":
        if self.portions and (min(self.portions) < 1 or sum(self.portions) != len(self.remove)):
            raise ValueError(f"portions {self.portions} do not add up to the {len(self.remove)} entries of remove")
        if self.portions and self.experts:
            raise ValueError("experts go with removal at once, not with portions")
        return self

    @classmethod
    def load(cls, path: Path) -> "Recipe":
        """Reads a recipe from JSON. Raises TuningError when it can't be read as one."""
        try:
            check_regular(path)
            if path.stat().st_size > _LARGEST:
                raise OSError(errno.EFBIG, f"it has more than {_LARGEST} bytes", str(path))
            return cls.model_validate_json(path.read_text())
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            reason = explain(error) if isinstance(error, ValidationError) else " ".join(_reason(error).split())
            raise TuningError(f"{path!s:.200} is no recipe ({reason:.300}): write name, version 1 and remove as JSON") from error


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


_SECOND_LAYERS = ("down.*.layer.1", "up.*.layer.1")

# The paper (A-SDM, arXiv 2406.00210) removes layers that are dear in time and doesn't say which. Those of `assembled` were
# measured: OMP_NUM_THREADS=1 python -m tuning rank --source mini --times random:sd15 --latents 64 --rounds 3
# (see docs/tuning.md).
# The bk ones are those of BK-SDM (arXiv 2305.15798).
RECIPES = {
    "original": Recipe(name="original"),
    "assembled": Recipe(name="assembled", remove=("down.0.*.attention", "down.-2.layer.1", "up.1.layer.0", "down.-1", "up.0")),
    "bk-base": Recipe(name="bk-base", remove=_SECOND_LAYERS),
    "bk-small": Recipe(name="bk-small", remove=(*_SECOND_LAYERS, "mid")),
    "bk-tiny": Recipe(name="bk-tiny", remove=(*_SECOND_LAYERS, "mid", "down.-1", "up.0")),
}
# The same surgery, so that the two can be compared; where the experts go follows from it.
RECIPES["condconv"] = RECIPES["assembled"].model_copy(update={"name": "condconv", "experts": Experts()})
# The same again, in three portions with distillation after each, to compare with one removal at equal training cost.
RECIPES["progressive"] = RECIPES["assembled"].model_copy(update={"name": "progressive", "portions": (1, 2, 2)})


def recipe(name: str) -> Recipe:
    """A built-in recipe by name, or one from a JSON file by path. Raises TuningError for neither."""
    if name in RECIPES:
        return RECIPES[name]
    if name.endswith(".json"):
        return Recipe.load(Path(name))
    raise TuningError(f"there is no recipe {name!r}: name one of {', '.join(RECIPES)}, or a .json file")
