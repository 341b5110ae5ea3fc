"""Model assembly: a UNet and a recipe in, a smaller UNet with the kept weights out.

The first half of A-SDM's tuning (arXiv 2406.00210). What differs from it: the removed layers are named by a recipe, and the
result is an ordinary diffusers UNet2DConditionModel, its configuration edited, whatever the widths and depths.
"""

import re
from collections import Counter
from fnmatch import fnmatchcase
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tuning.errors import TuningError
from tuning.recipes import Recipe
from tuning.units import unit_modules

__all__ = ["assemble", "removed_units"]

_LAYER = re.compile(r"((?:down|up)\.\d+)\.layer\.(\d+)\.")


def _from_the_end(glob: str, unet: nn.Module) -> str:
    """Turns "up.-1.x" into the name with the real number."""
    found = re.match(r"(down|up)\.-(\d+)(.*)", glob)
    if found is None:
        return glob
    count = len(getattr(unet, f"{found[1]}_blocks"))
    return f"{found[1]}.{count - int(found[2])}{found[3]}"


def removed_units(unet: nn.Module, recipe: Recipe) -> set[str]:
    """The units that the recipe's globs name. Raises TuningError for a glob that names none."""
    units = unit_modules(unet)
    removed: set[str] = set()
    for glob in recipe.remove:
        pattern = _from_the_end(glob, unet)
        matched = {u for u in units if fnmatchcase(u, pattern) or fnmatchcase(u, f"{pattern}.*")}
        if not matched:
            raise TuningError(f"recipe {recipe.name}: {glob!r} names no unit of this UNet; it has {', '.join(_layers(units))}")
        removed |= matched
    return removed


def _layers(units: dict[str, str]) -> list[str]:
    """Layer names, in order."""
    return list(dict.fromkeys(re.sub(r"\.(resnet|attention)$", "", unit) for unit in units))


def _kept_layers(units: dict[str, str], removed: set[str], name: str) -> dict[str, list[int]]:
    """Block -> the numbers of its kept layers. A layer goes as a whole or stays."""
    kept: dict[str, list[int]] = {}
    total: Counter[str] = Counter()
    for unit in units:
        if not (found := _LAYER.match(unit)):
            continue
        block, layer = found[1], int(found[2])
        members = [u for u in units if u.startswith(f"{block}.layer.{layer}.")]
        gone = [u for u in members if u in removed]
        if gone and len(gone) < len(members):
            raise TuningError(f"recipe {name}: {gone[0]} can't go alone; remove the whole {block}.layer.{layer}")
        if unit == members[0]:
            total[block] += 1
            kept.setdefault(block, [])
            if not gone:
                kept[block].append(layer)
    for block, layers in kept.items():
        if not layers:
            raise TuningError(
                f"recipe {name}: removes all {total[block]} layers of {block}, everything at its resolution; keep one"
            )
    return kept


def _check_others(units: dict[str, str], removed: set[str], name: str) -> bool:
    """Checks what is removed besides down and up layers; returns whether the mid block goes."""
    mid = {u for u in units if u.startswith("mid.")}
    for unit in removed:
        if unit in ("stem", "head") or unit.endswith(".sampler"):
            raise TuningError(f"recipe {name}: {unit} can't be removed: nothing else changes the size or the channels there")
    if mid & removed and not mid <= removed:
        raise TuningError(f"recipe {name}: a part of the mid block can't go alone; remove the whole of it as 'mid'")
    return bool(mid & removed)


def _layers_per_block(kept: dict[str, list[int]], blocks: int, name: str) -> tuple[int, ...]:
    """Layers of each down block, checked against the up block that consumes its skip connections."""
    counts = []
    for i in range(blocks):
        down, up = f"down.{i}", f"up.{blocks - 1 - i}"
        n, wanted = len(kept[down]), len(kept[up]) - 1
        if n != wanted:
            raise TuningError(
                f"recipe {name}: keeps {n} layers of {down} and {len(kept[up])} of {up}: a skip connection would be left "
                f"without its other end; remove as many layers of {up} as of {down}"
            )
        counts.append(n)
    return tuple(counts)


def _origin(student_unit: str, kept: dict[str, list[int]]) -> str:
    """The teacher's unit that a student's unit comes from."""
    if not (found := _LAYER.match(student_unit)):
        return student_unit
    layer = kept[found[1]][int(found[2])]
    return f"{found[1]}.layer.{layer}.{student_unit[found.end() :]}"


def _copy(teacher: nn.Module, student: nn.Module, kept: dict[str, list[int]], name: str) -> None:
    source: dict[str, Tensor] = teacher.state_dict()
    theirs, ours = unit_modules(teacher), unit_modules(student)
    renamed = {path: theirs[_origin(unit, kept)] for unit, path in ours.items()}
    state: dict[str, Tensor] = {}
    for key, value in student.state_dict().items():
        path = next((p for p in renamed if key.startswith(f"{p}.")), None)
        origin = key if path is None else renamed[path] + key[len(path) :]
        if source[origin].shape != value.shape:
            raise TuningError(
                f"recipe {name}: {origin} is {tuple(source[origin].shape)} and its new place needs {tuple(value.shape)}: "
                "keep the first and the last layer of every up block, whose skip connections have widths of their own"
            )
        state[key] = source[origin]
    student.load_state_dict(state)


def assemble(unet: UNet2DConditionModel, recipe: Recipe) -> UNet2DConditionModel:
    """A new UNet without the units that the recipe removes; every kept weight is the given UNet's, which stays as it is.

    Raises TuningError for a glob that names nothing, a layer that would lose only a part, a skip connection left without
    its other end, a block left without layers, or kept weights that don't fit their new place.
    """
    units, removed = unit_modules(unet), removed_units(unet, recipe)
    no_mid = _check_others(units, removed, recipe.name)
    kept = _kept_layers(units, removed, recipe.name)
    # diffusers would put defaults back for the names in _use_default_values.
    config: dict[str, Any] = {k: v for k, v in unet.config.items() if k != "_use_default_values"}
    per_block = _layers_per_block(kept, len(unet.down_blocks), recipe.name)
    config["layers_per_block"] = per_block[0] if len(set(per_block)) == 1 else per_block
    if no_mid:
        config["mid_block_type"] = None
    student: UNet2DConditionModel = UNet2DConditionModel.from_config(config)
    student.to(device=unet.device, dtype=unet.dtype)
    _copy(unet, student, kept, recipe.name)
    return student.train(unet.training)
