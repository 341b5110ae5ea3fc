"""``python -m tuning rank``: what each removal saves and costs, as a table, JSON and a plot, and the recipe chosen by it."""

import json
import math
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from engines.bundle.manifest import is_variant
from engines.bundle.shapes import is_multiple
from engines.support.files import check_writable, write_text
from engines.support.tables import fit
from runtime.embedded import DEFAULT
from tuning.checkpoints.configs import check_channels, latent_size
from tuning.checkpoints.find_source import RANDOM, UNetSource, open_unet
from tuning.errors import TuningError
from tuning.loras.changed_source import open_changed_unet
from tuning.loras.lora import Lora
from tuning.ranking.candidates import candidates, check_plain, recipe_of
from tuning.ranking.plot import plot_ranking
from tuning.ranking.rank import Chosen, Errors, Ranked, check_names, choose, rank
from tuning.ranking.timing import UnitTimes, clock, random_inputs, time_together, time_units
from tuning.ranking.trajectories import Points, trajectories
from tuning.surgery.assembly import assemble
from tuning.surgery.recipes import Recipe
from tuning.training.extras import need

__all__ = ["RankOptions", "rank_command"]


@dataclass(frozen=True)
class RankOptions:
    """A ranking: the UNet whose errors count with its files and LoRAs, the UNet to time (`times`), and how much is measured.

    `latents` is the side of the latents for timing; 0 stands for the UNet's own, at most 32. `device` is "cpu" or "cuda"; None
    stands for CUDA where torch sees it. `name` is that of the recipe, and of its file in `out`.
    """

    source: str = DEFAULT
    variant_files: str | None = None
    loras: tuple[Lora, ...] = ()
    times: str | None = None
    speedup: float = 1.35
    latents: int = 0
    rows: int = 2
    rounds: int = 5
    prompts: int = 16
    steps: int = 8
    guidance: float = 3.0
    device: str | None = None
    out: Path = Path("runs/rank")
    name: str = "ranked"


@dataclass(frozen=True)
class Result:
    """All that was measured; `measured` are the seconds of the whole UNet and of the assembled one, by what was timed."""

    ranked: list[Ranked]
    chosen: list[Chosen]
    recipe: Recipe
    times: UnitTimes
    side: int
    points: Points
    measured: dict[str, list[float]]
    device: str


def rank_command(options: RankOptions, console: Console) -> None:
    """Rank a source's removals, choose a recipe, and write rank.json, rank.png and the recipe's file; nothing if anything fails.

    Raises:
        TuningError: an option out of range, a source that cannot be read, UNets of unlike units, a speed-up out of reach, or a
            GPU that is not there or too small.
    """
    _check(options)
    need("matplotlib", "the plot")  # before anything is measured
    check_writable(options.out)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        try:
            result = _measure(options, bar)
        except torch.OutOfMemoryError as error:
            raise TuningError("the GPU's memory is too small for this: fewer --prompts, or --device cpu") from error
    console.print(fit(_table(result), console, ["± spread"]))
    for line in _lines(options, result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    write_text(options.out / "rank.json", json.dumps(_record(options, result), indent=1) + "\n")
    write_text(options.out / f"{options.name}.json", result.recipe.model_dump_json(indent=1, exclude_defaults=True) + "\n")
    plot_ranking(result.ranked, result.chosen, options.out / "rank.png", _title(options, result))
    console.print(f"written: {options.out}/rank.json, rank.png, {options.name}.json", highlight=False, soft_wrap=True)


def _check(options: RankOptions) -> None:
    if not 1 < options.speedup < math.inf:
        raise TuningError(f"speed-up {options.speedup:g}: must be more than 1, such as 1.35")
    if not math.isfinite(options.guidance):
        raise TuningError(f"guidance {options.guidance:g}: must be a number, such as 3")
    for name, least in (("rows", 1), ("rounds", 1), ("prompts", 1), ("steps", 1), ("latents", 0)):
        if getattr(options, name) < least:
            raise TuningError(f"{name} {getattr(options, name)}: must be {least} or more")
    if not is_variant(options.name) or options.name == "rank":
        raise TuningError(f"name {options.name!r:.60}: write small letters, numbers and -, such as ranked; not rank")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise TuningError("--device cuda: torch sees no NVIDIA GPU here; leave it out, or give cpu")
    if options.out.exists() and not options.out.is_dir():
        raise TuningError(f"{options.out} exists and is no folder; choose another --out")


def _measure(options: RankOptions, bar: Progress) -> Result:
    source = open_changed_unet(options.source, options.variant_files, options.loras)
    timed = source if options.times in (None, options.source) else open_unet(str(options.times))
    device = _device(options)
    if source.whole is not None:
        source.whole.check_fit()
    unet = _loaded(source, device)
    check_channels(source.name, unet.config, unet.config.out_channels)
    found = candidates(unet)
    other = unet if timed == source else _loaded(timed, device)
    side = _side(options, other)
    inputs = random_inputs(other, side, options.rows)
    task = bar.add_task(f"timing the units of {timed.name}", total=options.rounds + 1)
    times = time_units(other, inputs, options.rounds, lambda: bar.advance(task))
    check_names(found, times, source.name, timed.name)
    task = bar.add_task("trajectories", total=options.steps)
    points = trajectories(
        source, unet, prompts=options.prompts, steps=options.steps, guidance=options.guidance,
        side=min(_own_side(unet), 64), tick=lambda: bar.advance(task),
    )  # fmt: skip
    errors = Errors(unet, points)
    task = bar.add_task("errors", total=len(found))
    ranked = rank(found, errors, times, lambda: bar.advance(task))
    task = bar.add_task("choosing", total=None)
    chosen = choose(
        unet, found, errors, times, options.speedup, lambda at: bar.update(task, advance=1, description=f"choosing: {at}")
    )
    recipe = recipe_of(tuple(item for step in chosen for item in step.remove), options.name)
    measured = {timed.name: _compare(other, recipe, inputs, options.rounds)}
    if other is not unet:
        measured[source.name] = _compare(unet, recipe, random_inputs(unet, _own_side(unet), options.rows), 10 * options.rounds)
    return Result(ranked, chosen, recipe, times, side, points, measured, _name_of(device))


def _device(options: RankOptions) -> torch.device:
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _name_of(device: torch.device) -> str:
    """A device's name in the table."""
    return "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _loaded(source: UNetSource, device: torch.device) -> UNet2DConditionModel:
    """A source's UNet on the device. Raises TuningError where it has experts."""
    unet = source.unet().to(device)
    check_plain(unet, source.name)
    return unet


def _own_side(unet: UNet2DConditionModel) -> int:
    return min(latent_size(unet.config))


def _side(options: RankOptions, unet: UNet2DConditionModel) -> int:
    side, multiple = options.latents or min(_own_side(unet), 32), 1 << (len(unet.down_blocks) - 1)
    if not is_multiple([side], multiple):
        raise TuningError(f"latents {side}: this UNet needs a multiple of {multiple}")
    return side


def _compare(unet: UNet2DConditionModel, recipe: Recipe, inputs: Any, rounds: int) -> list[float]:
    return time_together([unet, assemble(unet, recipe, share=True)], inputs, rounds)


def _table(result: Result) -> Table:
    table = Table(
        "removed", title=f"what goes, and what that saves (on {result.device}) and costs: least error for the time first"
    )
    for name in ("share of time", "± spread", "error", "error per time"):
        table.add_column(name, justify="right")
    for each in result.ranked:
        numbers = f"{each.share:.1%}", f"{each.spread / 2:.1%}", f"{each.error:.2g}", f"{each.price:.2g}"
        table.add_row(each.candidate.name, *numbers)
    return table


def _lines(options: RankOptions, result: Result) -> list[str]:
    """The lines after the table."""
    lines = [f"{i}. remove {step.name}: error {step.error:.2g}, {step.speedup:.2f}x" for i, step in enumerate(result.chosen, 1)]
    for name, (whole, less) in result.measured.items():
        lines.append(
            f"measured, torch on {result.device}, {name}: {whole:.3g} s whole, {less:.3g} s assembled: {whole / less:.2f}x"
        )
    lines += _asked(options, result)
    if not result.points.has_text:
        lines.append(f"{options.source} has no text encoder: errors are for random text states")
    if options.source.startswith(RANDOM):
        lines.append(f"{options.source} has random weights: its errors mean nothing")
    return [*lines, f"recipe {options.name}: remove {', '.join(result.recipe.remove)}"]


def _asked(options: RankOptions, result: Result) -> list[str]:
    """The speed-up that was asked for, the one that the choice counted on, and the one that was measured."""
    name, (whole, less) = next(iter(result.measured.items()))
    words = "" if whole / less >= options.speedup else f", {options.speedup - whole / less:.2f} short of it"
    lines = [
        f"asked for {options.speedup:g}x: the choice ended when the units' shares of the time said "
        f"{result.chosen[-1].speedup:.2f}x; {name}, measured whole, is {whole / less:.2f}x{words}"
    ]
    keeps_mid = "mid" not in result.recipe.remove and any(unit.startswith("mid.") for unit in result.times.shares)
    if "up.0" in result.recipe.remove and keeps_mid:
        lines.append("without the innermost stage the mid block works on four times as many latents: shares leave that out")
    return lines


def _title(options: RankOptions, result: Result) -> str:
    return (
        f"Error of {options.source} against time of {options.times or options.source}\n"
        f"torch on {result.device}, latents {result.side} x {result.side}, {options.rows} rows"
    )


def _command(options: RankOptions) -> str:
    """The command that was run, without its defaults."""
    plain = asdict(RankOptions())
    hidden = {"out", "loras"}
    given = [
        f"--{key.replace('_', '-')} {value}"
        for key, value in asdict(options).items()
        if key == "source" or (value != plain[key] and key not in hidden)
    ]
    return " ".join(["python -m tuning rank", *given, *(f"--lora {lora}" for lora in options.loras)])


def _record(options: RankOptions, result: Result) -> dict[str, Any]:
    """Everything measured, with what it was measured on."""
    given = {key: value for key, value in asdict(options).items() if key != "out"}
    given["loras"] = [str(lora) for lora in options.loras]
    times = result.times
    return {
        "command": _command(options),
        "options": given | {"latents": result.side},
        "text": "text encoder" if result.points.has_text else "random states",
        "points": len(result.points),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "device": result.device,
        "threads": torch.get_num_threads(),
        "clock": clock(_device(options)).__name__,
        "versions": {name: version(name) for name in ("torch", "diffusers", "unet-heirloom")},
        "dtype": "float32",
        "seconds": times.seconds,
        "seconds_spread": times.seconds_spread,
        "units": {name: {"share": share, "spread": times.spreads[name]} for name, share in times.shares.items()},
        "candidates": [
            {"remove": r.candidate.remove, "share": r.share, "spread": r.spread, "error": r.error, "error_per_time": r.price}
            for r in result.ranked
        ],
        "selection": [asdict(step) for step in result.chosen],
        "measured_seconds": {n: {"whole": w, "assembled": a, "speedup": w / a} for n, (w, a) in result.measured.items()},
        "recipe": result.recipe.model_dump(mode="json"),
    }
