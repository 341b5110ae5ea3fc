"""The removals to choose from: every one that assembly accepts on its own."""

from dataclasses import dataclass
from itertools import product

from diffusers import UNet2DConditionModel

from engines.bundle.names import ATTENTION
from tuning.errors import TuningError
from tuning.surgery.assembly import assemble
from tuning.surgery.changes import KEY, apply_changes, changes_of
from tuning.surgery.meta import on_meta
from tuning.surgery.pruning import resolve_removals
from tuning.surgery.recipes import Recipe
from tuning.surgery.units import unit_modules

__all__ = ["Candidate", "candidates", "check_plain", "gone_units", "recipe_of", "skeleton"]


@dataclass(frozen=True)
class Candidate:
    """One removal: its name, as a recipe's `remove`, and the units that go with it."""

    name: str
    remove: tuple[str, ...]
    units: frozenset[str]


def skeleton(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same UNet without weights, on the meta device: whether a recipe fits is asked of it for nothing."""
    with on_meta():
        config = {key: value for key, value in unet.config.items() if key not in ("_use_default_values", KEY)}
        made: UNet2DConditionModel = UNet2DConditionModel.from_config(config)
        apply_changes(made, changes_of(unet))
    return made


def recipe_of(remove: tuple[str, ...], name: str = "assembled") -> Recipe:
    """A recipe that removes these, each once and in the order of their names; attentions of removed layers go with them."""
    layers = {item for item in remove if ".layer." in item and not item.endswith(ATTENTION)}
    needed = {item for item in remove if item.removesuffix(ATTENTION) not in layers or item in layers}
    return Recipe(name=name, remove=tuple(sorted(needed)))


def gone_units(unet: UNet2DConditionModel, recipe: Recipe) -> frozenset[str]:
    """The units that this recipe leaves out, a sampler that loses its stage among them. Raises TuningError if it does not fit."""
    pruning = resolve_removals(unet, recipe)
    stays = {pruning.origin(unit) for unit in unit_modules(assemble(unet, recipe, share=True))}
    return frozenset(unit for unit in unit_modules(unet) if unit not in stays)


def check_plain(unet: UNet2DConditionModel, name: str) -> None:
    """Raise TuningError for a UNet with conditional convolutions."""
    if changes_of(unet).experts is not None:
        raise TuningError(f"{name} has conditional convolutions already; rank the UNet that it was made from")


def candidates(unet: UNet2DConditionModel) -> list[Candidate]:
    """Every pair of a down layer with a layer of the mirrored up block, the mid block, each attention, the innermost stage.

    A pair is one because the down layer's skip connection needs a reader. Only those that assembly accepts are in the list.

    Raises TuningError for a UNet with conditional convolutions, of which assembly accepts none.
    """
    check_plain(unet, "this UNet")
    bare = skeleton(unet)
    units, stages = list(unit_modules(bare)), len(bare.down_blocks)
    layers = [unit.removesuffix(".resnet") for unit in units if unit.endswith(".resnet")]
    wanted: list[tuple[str, ...]] = [("mid",), (f"down.{stages - 1}", "up.0")]
    wanted += [(unit,) for unit in units if unit.endswith(ATTENTION)]
    for stage in range(stages):
        down = [layer for layer in layers if layer.startswith(f"down.{stage}.")]
        up = [layer for layer in layers if layer.startswith(f"up.{stages - 1 - stage}.")]
        wanted += list(product(down, up))
    found = []
    for remove in wanted:
        try:
            found.append(Candidate(" + ".join(remove), remove, gone_units(bare, recipe_of(remove))))
        except TuningError:
            continue
    return found
