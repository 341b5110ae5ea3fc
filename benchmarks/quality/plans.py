"""`python -m benchmarks.quality.plans`: what plans cost and what they do to pictures, for the embedded model.

For each plan: MACs and UNet time relative to `full`, as they were on one bundle that is partitioned for all of them; the share of
pictures in which a reader finds the concept and the style that were asked for, half of them pairs that training never saw; the
share in which it finds the concept that it finds in the picture that `full` makes from the same noise, right or not (`same`); and
PSNR and SSIM to that picture. Controls are in the same table: `full` with fewer steps of the solver. Plan files are rows too
(`--found`; by default three that a search found on other prompts). Times are taken in turns, plan after plan, and the median of
the ratios to `full` counts; shares and PSNR have 95 % intervals. Spearman's correlations say whether the reader's shares fall as
pictures get further from those of `full`.
Writes a CSV, a JSON beside it, a plot and a grid of pictures. A run that was broken off is resumed: what it has measured stays
in --work until it is done. With `--keep` the rows that the CSV has already, of a run with the same settings, stay as they are,
times included, and only the others are measured.
"""

import argparse
import csv
import io
import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

import runtime
from benchmarks.machine import machine, results_file
from benchmarks.quality.grid import draw_differences
from benchmarks.quality.judge import Judge, check_source, draw_prompts, shares, tensor_of
from benchmarks.quality.plans_plot import front, plot
from engines import UserError
from engines.support.cli import run_command
from engines.support.extras import need
from engines.support.files import atomic_file, write_text
from runtime.embedded import EXAMPLES
from runtime.report.cost import macs_of, share_of_rows
from tuning.emoji.concepts import Pair

__all__ = ["CONTROLS", "FOUND", "GRID", "PLANS", "RunFolder", "costs", "likeness", "main", "plan_and_steps"]

PLANS = (
    "full", "block:2", "block:3", "block:4", "block:6", "layer:2", "layer:3", "layer:5", "deepcache:2", "deepcache:3",
    "deepcache:4", "deepcache:6", "unit:2", "unit:3", "unit:5", "encoder:faster", "encoder:3", "quadratic:2", "quadratic:3",
    "front:3", "back:3", "random:3", "adaptive:0.1", "adaptive:0.2", "tgate:0.4", "tgate:0.8", "switch:0.4", "switch:0.7",
    "switch:0.4+block:3", "switch:0.7+block:3", "switch:0.4+layer:3", "switch:0.7+deepcache:3", "block:3+unit:2", "forecast:2",
    "forecast:3", "forecast:4", "skip:2", "skip:3", "skip:10", "guide:2", "guide:3", "skip:2+forecast:3",
    "skip:2+guide:3", "forecast:2+guide:2",
)  # fmt: skip
CONTROLS = ("6 steps", "7 steps", "8 steps", "10 steps", "12 steps", "14 steps")
"""`full`, with fewer steps of the solver."""
FOUND = tuple(Path("benchmarks/results/front") / f"found-{cost}.json" for cost in ("0.250", "0.417", "0.535"))
"""Plans that `python -m tuning plan` found."""
GRID = ("full", "deepcache:3", "skip:2", "skip:3", "6 steps", "unit:5", "encoder:faster", "deepcache:6", "skip:10")
"""The last one fails for everyone to see."""
COLUMNS = (
    "plan", "macs", "time", "time_low", "time_high", "concept", "concept_low", "concept_high", "concept_top5", "style", "same",
    "same_low", "same_high", "psnr", "psnr_low", "psnr_high", "psnr_p10", "ssim",
)  # fmt: skip
PROMPT = EXAMPLES["emoji"]
"""Of the pictures that are timed."""
_GRID_COLUMNS = 8
_SHARES = ("concept", "same")

PlanRow = dict[str, Any]


class RunFolder:
    """A folder with what a run has measured so far: JSON lines by name, and arrays of pictures.

    Raises:
        UserError: the folder holds a run with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        self.folder = folder
        wanted, path = json.loads(json.dumps(settings)), folder / "settings.json"
        if path.exists() and json.loads(path.read_text()) != wanted:
            raise UserError(f"{folder} holds a run with other settings; resume with those, remove it, or choose another --work")
        write_text(path, json.dumps(wanted, indent=2) + "\n")

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The lines under a name; a last line that was cut off does not count."""
        path = self.folder / f"{name}.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def add(self, name: str, line: Mapping[str, object]) -> None:
        """Add a line; the file takes the old one's place whole."""
        path = self.folder / f"{name}.jsonl"
        write_text(path, "".join(json.dumps(each) + "\n" for each in [*self.lines(name), line]))

    def pictures(self, plan: str) -> list[Image.Image]:
        """The pictures that ``put`` wrote."""
        return [Image.fromarray(array) for array in np.load(self._array(plan))]

    def put(self, plan: str, pictures: Sequence[Image.Image]) -> None:
        """Keep pictures of a plan."""
        with atomic_file(self._array(plan)) as temporary:
            np.save(temporary, np.stack([np.asarray(picture) for picture in pictures]))

    def _array(self, plan: str) -> Path:
        return self.folder / f"{plan.replace(':', '-')}.npy"


def costs(pipeline: runtime.Pipeline, plans: Sequence[str], options: argparse.Namespace, kept: RunFolder) -> dict[str, PlanRow]:
    """MACs and UNet time of each plan relative to `full`, as they were: plans take turns, and ratios are of the same round."""
    have = len(kept.lines("rounds"))
    for number in track(range(have, options.rounds), "rounds of timing"):
        # The first round of a process warms up.
        for _ in range(2 if number == have else 1):
            figures = {plan: _cost(pipeline, plan, number, options) for plan in plans}
        kept.add("rounds", figures)
    found = {}
    for plan in plans:
        macs, ratios = ([line[plan][i] / line["full"][i] for line in kept.lines("rounds")] for i in (0, 1))
        spread = {"time": statistics.median(ratios), "time_low": min(ratios), "time_high": max(ratios)}
        found[plan] = {name: round(value, 3) for name, value in {"macs": statistics.mean(macs), **spread}.items()}
    return found


def plan_and_steps(name: str, steps: int, files: Mapping[str, Path] = MappingProxyType({})) -> tuple[str | Path, int]:
    """The plan of a row and the steps that it runs: controls run `full`, with as many as they say.

    ``files`` are those of rows that are no presets.
    """
    number, _, word = name.partition(" ")
    return ("full", int(number)) if word == "steps" else (files.get(name, name), steps)


def _cost(pipeline: runtime.Pipeline, name: str, seed: int, options: argparse.Namespace) -> tuple[float, float]:
    """MACs of one row, and seconds, of a picture's UNet calls."""
    plan, steps = plan_and_steps(name, options.steps, options.files)
    made = pipeline.generate(PROMPT, steps=steps, guidance_scale=options.guidance, seed=seed, plan=plan)
    macs = sum(share_of_rows(record.half) * macs_of(pipeline.networks[record.unet].manifest, record.ran) for record in made.steps)
    return macs, sum(record.seconds for record in made.steps)


def likeness(pictures: Sequence[Image.Image], reference: Sequence[Image.Image]) -> PlanRow:
    """Mean PSNR in dB over the pictures that differ at all (None where none does) with its interval of 95 % and its tenth
    percentile, and mean SSIM.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    one, other = (
        torch.from_numpy(np.stack([np.asarray(p) for p in some])).permute(0, 3, 1, 2) / 255 for some in (pictures, reference)
    )
    if torch.equal(one, other):
        return dict.fromkeys(("psnr", "psnr_low", "psnr_high", "psnr_p10")) | {"ssim": 1.0}
    psnr = peak_signal_noise_ratio(one, other, data_range=1.0, dim=(1, 2, 3), reduction="none")
    ssim = structural_similarity_index_measure(one, other, data_range=1.0)
    assert isinstance(ssim, torch.Tensor)  # a tuple only where the full picture is asked for
    found = psnr[torch.isfinite(psnr)]
    mean, error = float(found.mean()), 1.96 * float(found.std(correction=0)) / math.sqrt(len(found))
    figures = {"psnr": mean, "psnr_low": mean - error, "psnr_high": mean + error, "psnr_p10": float(found.quantile(0.1))}
    return {name: round(value, 2) for name, value in figures.items()} | {"ssim": round(float(ssim), 4)}


def _quality(name: str, judge: Judge, pairs: Sequence[Pair], options: argparse.Namespace, kept: RunFolder) -> PlanRow:
    """The worth of a plan's pictures; the first of them (of `full`, all) are kept."""
    plan, steps = plan_and_steps(name, options.steps, options.files)
    prompts = [pair.prompt for pair in pairs]
    pictures = draw_prompts(options.bundle, prompts, plan=plan, steps=steps, guidance=options.guidance)
    kept.put(name, pictures if name == "full" else pictures[:_GRID_COLUMNS])
    full = kept.pictures("full")
    found = shares(judge.answers(tensor_of(pictures), pairs) | {"same": judge.agrees(tensor_of(pictures), tensor_of(full))})
    row: PlanRow = {"plan": name}
    for column, measure in (("concept", "concept_top1"), ("same", "same")):
        row |= {f"{column}{end}": found[measure][of] for end, of in (("", "share"), ("_low", "low"), ("_high", "high"))}
    row |= {"concept_top5": found["concept_top5"]["share"], "style": found["style"]["share"]}
    if name == "full":  # by definition
        row |= {"same_low": 1.0, "same_high": 1.0}
    return row | likeness(pictures, full)


def correlation(rows: Sequence[PlanRow], share: str) -> float | None:
    """Spearman's correlation, over the plans that change pictures, of a share that a reader finds and the PSNR to `full`.

    None where either is the same for all.
    """
    from scipy.stats import spearmanr

    found, psnrs = zip(*((row[share], row["psnr"]) for row in rows if row["psnr"] is not None), strict=True)
    if len(set(found)) == 1 or len(set(psnrs)) == 1:
        return None
    return round(float(spearmanr(found, psnrs).statistic), 3)


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.plans", description=__doc__)
    parser.add_argument(
        "--bundle", type=Path, default=Path("bundles/plans/original"), help="partitioned for all plans, as make plans builds it"
    )
    parser.add_argument("--model", type=Path, default=Path("models/emoji"), help="the reader's model (default: %(default)s)")
    parser.add_argument("--count", type=int, default=200, help="prompts, 8 or more (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of DPM++ (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=3.0, help="default: %(default)s")
    parser.add_argument("--found", type=Path, nargs="*", default=[*FOUND], help="plan files (default: three found plans)")
    parser.add_argument("--keep", action="store_true", help="measure only what --out does not have")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of timing (default: %(default)s)")
    parser.add_argument("--out", type=results_file, default="benchmarks/results/plans.csv", help="default: %(default)s")
    parser.add_argument("--plot", type=results_file, default="docs/plans.png", help="default: %(default)s")
    parser.add_argument("--grid", type=results_file, default="docs/plans_grid.png", help="default: %(default)s")
    parser.add_argument("--work", type=Path, default=Path("runs/plans"), help="where a run is kept until it is done")
    options = parser.parse_args(arguments)
    if options.count < _GRID_COLUMNS or options.rounds < 1:
        raise UserError(f"--count {options.count} --rounds {options.rounds}: choose {_GRID_COLUMNS} or more, and 1 or more")
    options.files = {runtime.find_plan(path).name: path for path in options.found}
    return options


def rows_there(path: Path, settings: Mapping[str, object]) -> dict[str, PlanRow]:
    """The rows of a CSV of results by their plans; raises UserError where the run that wrote it had other settings."""
    try:
        before = json.loads(path.with_suffix(".json").read_text())["settings"]
        with path.open() as file:
            lines = list(csv.DictReader(file))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--keep: {path} and its JSON cannot be read; leave --keep out to measure every row") from error
    if before != json.loads(json.dumps(settings)):
        raise UserError(f"--keep: {path} has rows of a run with other settings; give those, or leave --keep out")
    return {line["plan"]: {name: _number(value) if name != "plan" else value for name, value in line.items()} for line in lines}


def _number(text: str) -> float | None:
    return float(text) if text else None


def main(arguments: Sequence[str]) -> None:
    """Measure every plan; raises UserError where the bundle is missing, of another model, or cannot run one."""
    options = _arguments(arguments)
    need("scipy", "the correlation")  # before anything is measured
    need("matplotlib", "the plot")
    judge, pipeline = Judge.of(options.model), runtime.load(options.bundle)
    check_source(pipeline.manifest.source, options.bundle, options.model)
    pairs = judge.asked(options.count)
    settings = {
        "model": str(options.model), "prompts": options.count, "steps": options.steps, "scheduler": "dpm++",
        "guidance": options.guidance, "dtype": "float32",
        "engine": "onnxruntime", "rounds": options.rounds,
    }  # fmt: skip
    every = (*PLANS, *options.files, *CONTROLS)
    there = rows_there(options.out, settings) if options.keep else {}
    names = [name for name in every if name == "full" or name not in there]
    for name in {*names, *GRID}:  # refused now rather than after an hour; this loads the bundles to switch to
        plan, steps = plan_and_steps(name, options.steps, options.files)
        timesteps = [1000 * (1 - step / steps) for step in range(steps)]
        pipeline.schedule(runtime.find_plan(plan), timesteps, guided=options.guidance > 1)
    bundles = {name: network.manifest.key for name, network in pipeline.networks.items()}
    kept = RunFolder(options.work, settings | {"bundles": bundles, "plans": names})
    found = costs(pipeline, names, options, kept)
    done = {row["plan"] for row in kept.lines("plans")}
    for name in track([name for name in names if name not in done], "plans"):
        kept.add("plans", _quality(name, judge, pairs, options, kept))
    measured = {row["plan"]: row | found[row["plan"]] for row in kept.lines("plans")} | there
    rows = [measured[name] for name in every]
    _draw_missing(names, pairs, options, kept)
    _write(rows, settings, options)
    _draw_grid(rows, [judge.title(pair) for pair in pairs[:_GRID_COLUMNS]], kept, options)
    _show(rows, options)
    shutil.rmtree(options.work)


def _write(rows: Sequence[PlanRow], settings: Mapping[str, object], options: argparse.Namespace) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_text(options.out, table.getvalue())
    correlations = {f"correlation of {share} and psnr": correlation(rows, share) for share in _SHARES}
    described = {"settings": settings} | correlations | _fronts(rows) | machine()
    write_text(options.out.with_suffix(".json"), json.dumps(described, indent=2) + "\n")
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    plot(rows, f"{options.count} emoji, half of them held back from training, {options.steps} steps of DPM++", options.plot)


def _fronts(rows: Sequence[PlanRow]) -> dict[str, list[str]]:
    """By time, which varies from run to run, and by MACs, which do not."""
    pairs = product(("same", "psnr"), ("time", "macs"))
    return {f"front by {measure} and {cost}": front(rows, measure, cost) for measure, cost in pairs}


def _draw_missing(names: Sequence[str], pairs: Sequence[Pair], options: argparse.Namespace, kept: RunFolder) -> None:
    """Make the pictures of the grid whose rows were kept."""
    prompts = [pair.prompt for pair in pairs[:_GRID_COLUMNS]]
    for name in (name for name in GRID if name not in names):
        plan, steps = plan_and_steps(name, options.steps, options.files)
        kept.put(name, draw_prompts(options.bundle, prompts, plan=plan, steps=steps, guidance=options.guidance))


def _draw_grid(rows: Sequence[PlanRow], titles: Sequence[str], kept: RunFolder, options: argparse.Namespace) -> None:
    options.grid.parent.mkdir(parents=True, exist_ok=True)
    speeds = {row["plan"]: 1 / row["time"] for row in rows}
    names = {plan: f"{plan.replace('+', '+' + chr(10))}\n{speeds[plan]:.2f} times" for plan in GRID}
    lines = [(names[plan], kept.pictures(plan)[:_GRID_COLUMNS]) for plan in GRID]
    draw_differences(lines, titles, options.grid)


def _show(rows: Sequence[PlanRow], options: argparse.Namespace) -> None:
    table = Table(*COLUMNS, title=f"{options.count} prompts, {options.steps} steps of DPM++", box=SIMPLE)
    for row in rows:
        table.add_row(*("-" if row[column] is None else str(row[column]) for column in COLUMNS))
    console = Console(highlight=False, width=160)
    console.print(table)
    for name, plans in _fronts(rows).items():
        console.print(f"Pareto {name}: {', '.join(plans)}")
    for share in _SHARES:
        console.print(f"Spearman's correlation of {share} and psnr: {correlation(rows, share)}")
    console.print(f"wrote {options.out}, {options.out.with_suffix('.json')}, {options.plot} and {options.grid}")


if __name__ == "__main__":
    run_command(main)
