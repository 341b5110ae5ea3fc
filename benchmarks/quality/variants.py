"""`python -m benchmarks.quality.variants`: what every variant of the embedded model's UNet costs and what its pictures are worth.

Parameters and MACs, UNet time (ONNX Runtime on the CPU, variants in turns, medians of the ratios to `original` of the same
round), the shares of pictures in which a reader finds the concept and the style that were asked for, and PSNR to the pictures of
`original` from the same noise; before distillation and after. Half of the pairs asked for are held back from training. Builds the
bundles it needs under bundles/variants, writes a JSON file, a Markdown table and a picture of pictures.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

import runtime
import tuning
from benchmarks.machine import machine, results_file
from benchmarks.quality.grid import draw
from benchmarks.quality.judge import Answers, Judge, difference, draw_prompts, shares, tensor_of
from benchmarks.quality.plans import likeness
from benchmarks.quality.variants_page import BEFORE, markdown, measured_before, page
from engines import Bundle, UserError, make_engine
from engines.support.cli import run_command
from engines.support.extras import need
from engines.support.files import write_text
from exporter import BuildOptions, build
from runtime.embedded import EXAMPLES
from tuning.checkpoints.folder import save_part
from tuning.emoji.concepts import Pair

__all__ = ["ROWS", "Row", "main"]

MODEL = Path("models/emoji")
_COLUMNS = 8
"""Of the picture of pictures."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a variant's UNet as it was distilled, or as it was cut out of the original."""

    variant: str
    distilled: bool = True

    @property
    def name(self) -> str:
        """How the table calls it."""
        return self.variant if self.distilled else f"{self.variant}{BEFORE}"

    @property
    def folder(self) -> str:
        """Where its bundle is, under --bundles."""
        return self.variant if self.distilled else f"{self.variant}-before"


# condconv before distillation is assembled before distillation, bit for bit: tests/tuning/surgery/test_condconv.py.
ROWS = (
    Row("original"),
    Row("assembled", distilled=False),
    Row("assembled"),
    Row("condconv"),
    Row("bk-tiny", distilled=False),
    Row("bk-tiny"),
)


def make_bundle(row: Row, bundles: Path) -> Path:
    """Builds a row's bundle, the UNet in one segment, unless it is up to date; returns its folder."""
    unet = None
    if not row.distilled:
        unet = bundles / f"unet-{row.folder}"
        save_part(tuning.assemble(tuning.load_unet(MODEL / "unet"), tuning.recipe(row.variant)), unet)
    options = BuildOptions(
        source="emoji", variant=row.variant, unet=unet, granularity=None, plans=("full",), out=bundles / row.folder, force=True
    )
    build(options)
    return bundles / row.folder


def _make_bundles(bundles: Path) -> dict[str, Path]:
    """The folders of all rows' bundles, by the rows' names."""
    return {row.name: make_bundle(row, bundles) for row in ROWS}


def times(pipelines: Mapping[str, runtime.Pipeline], steps: int, rounds: int, pixels: int) -> dict[str, list[float]]:
    """UNet seconds of each row as ratios to the first one's in the same round; rows take turns. One picture with guidance."""
    first = next(iter(pipelines))
    ratios: dict[str, list[float]] = {name: [] for name in pipelines}
    for number in range(rounds + 1):
        seconds = {}
        for name, pipeline in pipelines.items():
            made = pipeline.generate(EXAMPLES["emoji"], steps=steps, seed=number, height=pixels, width=pixels)
            seconds[name] = sum(record.seconds for record in made.steps)
        if number:  # the first round warms up
            for name in pipelines:
                ratios[name].append(seconds[name] / seconds[first])
    return ratios


def _costs(pipeline: runtime.Pipeline) -> dict[str, float]:
    """Parameters and MACs (of one row of the batch) of the UNet."""
    units = [unit for unit in pipeline.manifest.units if unit.name in pipeline.manifest.unet_units]
    return {"parameters": sum(unit.parameters for unit in units), "macs": sum(unit.macs for unit in units)}


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(ratios), 3), "low": round(min(ratios), 3), "high": round(max(ratios), 3)}


def measure_rows(options: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], list[tuple[str, list[Image.Image]]], list[str]]:
    """Every figure of every row; their first pictures; and what those are of."""
    judge = Judge.of(MODEL)
    pairs = judge.asked(options.count)
    folders = _make_bundles(options.bundles)
    rows: dict[str, dict[str, Any]] = {name: {} for name in folders}
    _measure_times(rows, folders, options)
    pictures = {name: _draw(folder, pairs, options) for name, folder in folders.items()}
    answers = {name: judge.answers(tensor_of(some), pairs) for name, some in pictures.items()}
    for name, row in rows.items():
        row |= _worth(answers, name, pairs, judge) | {"likeness": likeness(pictures[name], pictures["original"])}
    titles = [judge.title(pair) for pair in pairs[:_COLUMNS]]
    return rows, [(name.replace(", ", "\n"), some[:_COLUMNS]) for name, some in pictures.items()], titles


def _measure_times(rows: Mapping[str, dict[str, Any]], folders: Mapping[str, Path], options: argparse.Namespace) -> None:
    """Costs and times of every row, whose bundles are in the folders."""
    engine = make_engine("onnxruntime")
    pipelines = {name: runtime.Pipeline(Bundle.open(folder), engine) for name, folder in folders.items()}
    for name, pipeline in pipelines.items():
        rows[name] |= _costs(pipeline)
    for key, pixels, steps in (("time", 128, options.steps), ("time_large", options.pixels, 2)):
        for name, ratios in times(pipelines, steps, options.rounds, pixels).items():
            rows[name][key] = _spread(ratios)


def _draw(bundle: Path, pairs: Sequence[Pair], options: argparse.Namespace) -> list[Image.Image]:
    Console(stderr=True).print(f"{bundle.name}: {len(pairs)} pictures", highlight=False)
    return draw_prompts(bundle, [pair.prompt for pair in pairs], steps=options.steps, guidance=options.guidance)


def _worth(answers: Mapping[str, Answers], name: str, pairs: Sequence[Pair], judge: Judge) -> dict[str, Any]:
    """Shares on pairs that training saw and on those held back; and what is won (or lost) over `original` and `assembled`."""
    held = set(judge.held)
    parts = {"seen": [pair not in held for pair in pairs], "held_back": [pair in held for pair in pairs]}
    worth: dict[str, Any] = {
        part: shares({measure: [a for a, k in zip(each, kept, strict=True) if k] for measure, each in answers[name].items()})
        for part, kept in parts.items()
    }
    first = answers[name]["concept_top1"]
    return worth | {f"over_{other}": difference(first, answers[other]["concept_top1"]) for other in ("original", "assembled")}


def main(arguments: Sequence[str]) -> None:
    """Run the command; raises UserError for a variant that has no weights."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.variants", description=__doc__)
    parser.add_argument("--bundles", type=Path, default=Path("bundles/variants"), help="default: bundles/variants")
    parser.add_argument("--count", type=int, default=300, help="prompts, 16 or more (default: 300)")
    parser.add_argument("--steps", type=int, default=20, help="steps of DPM++ (default: 20)")
    parser.add_argument("--guidance", type=float, default=3.0, help="default: 3")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of timing (default: 9)")
    parser.add_argument("--pixels", type=int, default=256, help="the larger size to time at (default: 256)")
    parser.add_argument("--out", type=results_file, default="benchmarks/results/variants.json")
    parser.add_argument("--table", type=results_file, default="docs/variants.md")
    parser.add_argument("--pictures", type=results_file, default="docs/variants.png")
    parser.add_argument("--times", action="store_true", help="measure the times alone: --out holds the rest")
    parser.add_argument("--page", action="store_true", help="measure nothing: write --table from what --out holds")
    options = parser.parse_args(arguments)
    if options.count < 2 * _COLUMNS or options.rounds < 1:
        raise UserError(f"--count {options.count} --rounds {options.rounds}: choose {2 * _COLUMNS} or more, and 1 or more")
    if not (options.page or options.times):  # before anything is measured
        need("torchmetrics", "PSNR of the pictures", "train")
        need("matplotlib", "the page's pictures")
    result = measured_before(options.out) if options.page or options.times else _measure(options)
    if options.times:
        _measure_times_again(result, options)
    write_text(options.table, page(result))
    print(markdown(result), end="")
    made = [options.out] * (not options.page) + [options.table] + [options.pictures] * (not (options.page or options.times))
    print(f"wrote {' and '.join(map(str, made))}")


def _measure_times_again(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Measures the times alone, and writes them with what else the result holds.

    Raises UserError for other steps than those of the pictures.
    """
    if options.steps != (steps := result["settings"]["steps"]):
        raise UserError(f"--steps {options.steps}: {options.out} is of pictures in {steps}; leave out --times to make others")
    _measure_times(result["rows"], _make_bundles(options.bundles), options)
    result["settings"] |= {name: getattr(options, name) for name in ("rounds", "pixels")}
    write_text(options.out, json.dumps(result | machine(), indent=2) + "\n")


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measures every row, and writes figures and pictures."""
    names = ("count", "steps", "guidance", "rounds", "pixels")
    settings = {name: getattr(options, name) for name in names} | {
        "scheduler": "dpm++",
        "engine": "onnxruntime",
        "dtype": "float32",
    }
    rows, pictures, titles = measure_rows(options)
    result = {"settings": settings, "rows": rows} | machine()
    write_text(options.out, json.dumps(result, indent=2) + "\n")
    options.pictures.parent.mkdir(parents=True, exist_ok=True)
    draw(pictures, titles, options.pictures)
    return result


if __name__ == "__main__":
    run_command(main)
