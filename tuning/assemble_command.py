"""``python -m tuning assemble``: the folder of a UNet from which a recipe has left things out."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import nn

from engines.support.files import atomic_directory
from tuning.checkpoints.find_source import check_apart, named_path
from tuning.checkpoints.folder import ASSEMBLY_NOTE, save_part, weights_sha256
from tuning.errors import TuningError
from tuning.loras.changed_source import open_changed_unet
from tuning.loras.lora import Lora
from tuning.loras.note import describe, read_note, write_note
from tuning.surgery.assembly import assemble
from tuning.surgery.pruning import removed_units
from tuning.surgery.recipes import Recipe, recipe
from tuning.surgery.units import unit_modules

__all__ = ["PRECISIONS", "assemble_command", "check_replaceable"]

PRECISIONS = {"fp16": torch.float16, "fp32": torch.float32}


def assemble_command(
    source: str, name: str, out: Path, precision: str, console: Console, variant_files: str | None = None,
    loras: Sequence[Lora] = (),
) -> None:  # fmt: skip
    """Assemble a source's UNet by a recipe into ``out``, with a note of what it was made from, and say what changed.

    ``variant_files`` tells which weight files of the source are read, such as fp16, where there are several; ``loras`` are fused
    into the UNet first.

    Raises:
        TuningError: no such source, recipe or precision, a recipe that does not fit the UNet, something else at ``out``,
            or the source at ``out``.
    """
    if precision not in PRECISIONS:
        raise TuningError(f"unknown precision {precision!r}; choose from: {', '.join(PRECISIONS)}")
    wanted = recipe(name)
    check_apart(out, named_path(source), "source")
    check_replaceable(out)
    found = open_changed_unet(source, variant_files, loras)
    teacher = found.unet()
    table = _table(teacher, wanted)
    before = _parameters(teacher)
    student = assemble(teacher, wanted)
    del teacher  # of a large model both are gigabytes, and writing takes as much again
    after = _parameters(student)
    note = {"source": source, "parameters": {"before": before, "after": after}, "recipe": wanted.model_dump(mode="json")}
    with atomic_directory(out) as folder:
        save_part(student, folder / "unet", PRECISIONS[precision])
        for file in (folder / "unet").iterdir():
            file.rename(folder / file.name)
        (folder / "unet").rmdir()
        write_note(folder, (*(read_note(found.folder) if found.folder else ()), *describe(loras)))
        note["weights_sha256"] = weights_sha256(folder)
        (folder / ASSEMBLY_NOTE).write_text(json.dumps(note, indent=1) + "\n", "utf-8")
    if table.row_count:
        console.print(table)
    with_loras = "".join(f" with {lora.path.name} at {lora.scale:g}" for lora in loras)
    numbers = f"{before / 1e6:.1f} M parameters before, {after / 1e6:.1f} M after ({after / before:.1%})"
    for words in (f"{numbers}: {wanted.name} UNet of {source}{with_loras}, not distilled", f"written: {out}"):
        console.print(words, highlight=False, markup=False, soft_wrap=True)


def check_replaceable(out: Path) -> None:
    """Raise TuningError unless ``out`` is free, empty, or a UNet's folder, which may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        kind = json.loads((out / "config.json").read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError):
        kind = None
    if kind != "UNet2DConditionModel":
        raise TuningError(f"{out} exists and is no UNet's folder, so it is kept; choose another --out")


def _parameters(unet: nn.Module) -> int:
    return sum(weights.numel() for weights in unet.parameters())


def _table(unet: UNet2DConditionModel, wanted: Recipe) -> Table:
    """The units that are removed, and how many parameters each had."""
    table = Table("removed", title=f"{wanted.name}: what goes")
    table.add_column("parameters", justify="right")
    units, removed = unit_modules(unet), removed_units(unet, wanted)
    for unit, path in units.items():
        if unit in removed:
            table.add_row(unit, f"{_parameters(unet.get_submodule(path)):,}")
    return table
