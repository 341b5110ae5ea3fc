"""The layers that a recipe keeps of a UNet, worked out and checked by names alone, before anything is built."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from engines.bundle.names import ATTENTION, NOISE, STEM
from tuning.errors import TuningError
from tuning.surgery.recipes import Recipe
from tuning.surgery.units import unit_modules

__all__ = ["PruningPlan", "from_the_end", "removed_units", "resolve_removals"]

_LAYER = re.compile(r"((?:down|up)\.\d+)\.layer\.(\d+)\.")
_BLOCK = re.compile(r"(down|up)\.(\d+)\.")


@dataclass(frozen=True)
class PruningPlan:
    """`layers`: teacher's block -> numbers of its kept layers; blocks of the `cut` innermost stages are not in it.

    `bare` are the kept layers (teacher's names) whose attention goes alone.
    """

    layers: dict[str, tuple[int, ...]]
    cut: int
    mid: bool
    bare: frozenset[str]

    def origin(self, unit: str) -> str:
        """The teacher's unit that a student's unit comes from."""
        if not (block := _BLOCK.match(unit)):
            return unit
        theirs = f"{block[1]}.{int(block[2]) + (self.cut if block[1] == 'up' else 0)}"
        if layer := _LAYER.match(unit):
            return f"{theirs}.layer.{self.layers[theirs][int(layer[2])]}.{unit[layer.end() :]}"
        return f"{theirs}.{unit[block.end() :]}"


def removed_units(unet: nn.Module, recipe: Recipe) -> set[str]:
    """The units that the recipe's globs name. Raises TuningError for a glob that names none."""
    units = unit_modules(unet)
    removed: set[str] = set()
    for glob in recipe.remove:
        pattern = from_the_end(glob, unet)
        matched = {u for u in units if fnmatchcase(u, pattern) or fnmatchcase(u, f"{pattern}.*")}
        if not matched:
            raise TuningError(f"recipe {recipe.name}: {glob!r} names no unit of this UNet; it has {_choices(pattern, units)}")
        removed |= matched
    return removed


def from_the_end(glob: str, unet: nn.Module) -> str:
    """Turns "up.-1.x" into the name with the real number."""
    found = re.match(r"(down|up)\.-(\d{1,4})(\D.*|)$", glob)
    if found is None:
        return glob
    count = len(getattr(unet, f"{found[1]}_blocks"))
    return f"{found[1]}.{count - int(found[2])}{found[3]}"


def _choices(pattern: str, units: dict[str, str]) -> str:
    """The units of the block that was meant; where there is no such block, the blocks."""
    block = re.match(r"mid|(?:down|up)\.\d+", pattern)
    meant = [u for u in units if block and u.startswith(f"{block[0]}.")]
    return ", ".join(meant or dict.fromkeys(".".join(u.split(".")[: 1 if u.startswith("mid") else 2]) for u in units))


def resolve_removals(unet: nn.Module, recipe: Recipe) -> PruningPlan:
    """The layers, stages and mid block that the recipe keeps of this UNet.

    Raises TuningError for a glob that names nothing, a ResNet without its attention, a skip connection left without its other
    end, everything at a resolution that is not the innermost, a part of the mid block, a stem, a head, or a sampler.
    """
    units, removed, name = unit_modules(unet), removed_units(unet, recipe), recipe.name
    stages = len(unet.down_blocks)  # type: ignore[arg-type]
    layers = {block: _kept_layers(block, units, removed, name) for block in _block_names(stages)}
    cut = _cut_stages(layers, stages, name)
    left = stages - cut
    _check_skips(layers, stages, left, name)
    _check_ends(removed, stages, left, name)
    bare = {u.removesuffix(ATTENTION) for u in removed if u.endswith(ATTENTION)}
    inside = {f"{block}.layer.{layer}" for block, numbers in layers.items() for layer in numbers}
    mid = _keeps_mid(units, removed, name)
    if mid:
        inside |= {u.removesuffix(ATTENTION) for u in units if u.startswith("mid.")}
    gone = {f"down.{i}" for i in range(left, stages)} | {f"up.{i}" for i in range(cut)}
    return PruningPlan({b: n for b, n in layers.items() if b not in gone}, cut, mid, frozenset(bare & inside))


def _block_names(stages: int) -> list[str]:
    return [f"down.{i}" for i in range(stages)] + [f"up.{i}" for i in range(stages)]


def _kept_layers(block: str, units: dict[str, str], removed: set[str], name: str) -> tuple[int, ...]:
    """The numbers of a block's kept layers: those that keep their ResNet."""
    kept = []
    for unit in units:
        if not unit.startswith(f"{block}.layer.") or not unit.endswith(".resnet"):
            continue
        layer = unit.removesuffix(".resnet")
        if unit not in removed:
            kept.append(int(layer.rsplit(".", 1)[1]))
        elif f"{layer}{ATTENTION}" in units and f"{layer}{ATTENTION}" not in removed:
            raise TuningError(f"recipe {name}: {unit} can't go alone; remove the whole {layer}, or only {layer}{ATTENTION}")
    return tuple(kept)


def _cut_stages(layers: dict[str, tuple[int, ...]], stages: int, name: str) -> int:
    """How many innermost stages go as a whole, on both ways."""
    cut = 0
    for stage in reversed(range(stages)):
        down, up = f"down.{stage}", f"up.{stages - 1 - stage}"
        gone = [block for block in (down, up) if not layers[block]]
        if len(gone) == 1:
            raise TuningError(f"recipe {name}: removes all layers of {gone[0]} only; a stage goes as a whole, as {down} and {up}")
        if gone and (stage == 0 or cut != stages - 1 - stage):
            raise TuningError(
                f"recipe {name}: removes all layers of {down} and {up}, everything at its resolution, which is not the "
                "innermost; keep one on each way"
            )
        cut += bool(gone)
    return cut


def _check_skips(layers: dict[str, tuple[int, ...]], stages: int, left: int, name: str) -> None:
    """Every kept layer on the way down, and the sampler or stem before it, has one consumer on the way up."""
    for stage in range(left):
        down, up = f"down.{stage}", f"up.{stages - 1 - stage}"
        if len(layers[down]) != len(layers[up]) - 1:
            raise TuningError(
                f"recipe {name}: keeps {len(layers[down])} layers of {down} and {len(layers[up])} of {up}: a skip connection "
                f"would be left without its other end; remove as many layers of {up} as of {down}"
            )


def _check_ends(removed: set[str], stages: int, left: int, name: str) -> None:
    """Stem and head stay; a sampler goes only with the stage that it leads to or comes from."""
    free = {f"down.{i}.sampler" for i in range(left - 1, stages)} | {f"up.{i}.sampler" for i in range(stages - left)}
    for unit in sorted(removed):
        if unit in (STEM, NOISE) or (unit.endswith(".sampler") and (unit not in free or left == stages)):
            raise TuningError(f"recipe {name}: {unit} can't be removed: nothing else changes the size or the channels there")


def _keeps_mid(units: dict[str, str], removed: set[str], name: str) -> bool:
    """Whether there is a mid block and it stays, with or without its attention."""
    mid = {u for u in units if u.startswith("mid.")}
    resnets = {u for u in mid if u.endswith(".resnet")}
    if resnets & removed and not mid <= removed:
        raise TuningError(
            f"recipe {name}: a part of the mid block can't go alone; remove the whole of it as 'mid', or mid.layer.0.attention"
        )
    return bool(resnets - removed)
