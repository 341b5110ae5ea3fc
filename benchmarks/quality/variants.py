"""`python -m benchmarks.quality.variants`: what every variant of the embedded model's UNet costs and what its pictures are worth.

Parameters and MACs, UNet time (ONNX Runtime on the CPU, variants in turns, medians of the ratios to `original` of the same
round), the share of held-back prompts that the pictures show, and the Frechet distance to rendered pictures; before distillation
and after. Builds the bundles it needs under bundles/variants, writes a JSON file, a Markdown table and a picture of pictures.
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
from benchmarks.quality.attributes import measure
from benchmarks.quality.frechet import RENDERED, distance_to, rendered
from benchmarks.quality.grid import PROMPTS, draw
from benchmarks.quality.judge import tensor_of
from benchmarks.quality.variants_page import BEFORE, markdown, measured_before, page
from engines import Bundle, make_engine
from engines.support.cli import run_command
from engines.support.extras import need
from engines.support.files import write_text
from exporter import BuildOptions, build
from tuning.checkpoints.folder import save_part
from tuning.mini.scenes import held_back_prompts

__all__ = ["ROWS", "Row", "main"]

MODEL = Path("models/mini")


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
        variant=row.variant, unet=unet, granularity=None, plans=("full",), out=bundles / row.folder, force=True
    )
    build(options)
    return bundles / row.folder


def times(pipelines: Mapping[str, runtime.Pipeline], steps: int, rounds: int, pixels: int) -> dict[str, list[float]]:
    """UNet seconds of each row as ratios to the first one's in the same round; rows take turns. One picture with guidance."""
    first = next(iter(pipelines))
    ratios: dict[str, list[float]] = {name: [] for name in pipelines}
    for number in range(rounds + 1):
        seconds = {}
        for name, pipeline in pipelines.items():
            made = pipeline.generate(PROMPTS[0], steps=steps, seed=number, height=pixels, width=pixels)
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


def measure_rows(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every figure of every row."""
    console = Console(stderr=True)
    folders = {row.name: make_bundle(row, options.bundles) for row in ROWS}
    engine = make_engine("onnxruntime")
    pipelines = {name: runtime.Pipeline(Bundle.open(folder), engine) for name, folder in folders.items()}
    rows: dict[str, dict[str, Any]] = {name: _costs(pipeline) for name, pipeline in pipelines.items()}
    for key, pixels, steps in (("time", 64, options.steps), ("time_large", options.pixels, 2)):
        for name, ratios in times(pipelines, steps, options.rounds, pixels).items():
            rows[name][key] = _spread(ratios)
    prompts = held_back_prompts(options.count)
    sets = []
    for name, folder in folders.items():
        figures, pictures, _ = measure(
            folder, "full", prompts, steps=options.steps, guidance=options.guidance, engine="onnxruntime"
        )
        rows[name] |= {"accuracy": figures["rules"]["all"], "attributes": figures["rules"]}
        sets.append(tensor_of(pictures))
        console.print(f"{name}: {100 * rows[name]['accuracy']:.1f} %", highlight=False)
    others = list(rendered(options.count, "other renders", options.count))
    *distances, floor = distance_to(rendered(options.rendered, "frechet"), [*sets, *others])
    for name, distance in zip(rows, distances, strict=True):
        rows[name]["frechet"] = round(distance, 3)
    rows["rendered pictures"] = {"frechet": round(floor, 3)}
    return rows


def _pictures(options: argparse.Namespace) -> list[tuple[str, list[Image.Image]]]:
    rows = []
    for row in ROWS:
        made = runtime.generate(list(PROMPTS), steps=options.steps, seed=1, bundle=options.bundles / row.folder)
        rows.append((row.name.replace(", ", "\n"), made.images))
    return rows


def main(arguments: Sequence[str]) -> None:
    """Run the command; raises UserError for a variant that has no weights."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.variants", description=__doc__)
    parser.add_argument("--bundles", type=Path, default=Path("bundles/variants"), help="default: bundles/variants")
    parser.add_argument("--count", type=int, default=500, help="prompts (default: 500)")
    parser.add_argument("--rendered", type=int, default=RENDERED, help=f"rendered pictures (default: {RENDERED})")
    parser.add_argument("--steps", type=int, default=20, help="of DPM++ (default: 20)")
    parser.add_argument("--guidance", type=float, default=3.0, help="default: 3")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of timing (default: 9)")
    parser.add_argument("--pixels", type=int, default=256, help="the larger size to time at (default: 256)")
    parser.add_argument("--out", type=results_file, default="benchmarks/results/variants.json")
    parser.add_argument("--table", type=results_file, default="docs/variants.md")
    parser.add_argument("--pictures", type=results_file, default="docs/variants.png")
    parser.add_argument("--page", action="store_true", help="measure nothing: write --table from what --out holds")
    options = parser.parse_args(arguments)
    if not options.page:  # before anything is measured
        need("scipy", "reading the pictures")
        need("matplotlib", "the page's pictures")
    result = measured_before(options.out) if options.page else _measure(options)
    write_text(options.table, page(result))
    print(markdown(result), end="")
    print(f"wrote {options.table}" if options.page else f"wrote {options.out}, {options.table} and {options.pictures}")


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measures every row, and writes figures and pictures."""
    names = ("count", "rendered", "steps", "guidance", "rounds", "pixels")
    settings = {name: getattr(options, name) for name in names} | {
        "scheduler": "dpm++",
        "engine": "onnxruntime",
        "dtype": "float32",
    }
    result = {"settings": settings, "rows": measure_rows(options)} | machine()
    write_text(options.out, json.dumps(result, indent=2) + "\n")
    options.pictures.parent.mkdir(parents=True, exist_ok=True)
    draw(_pictures(options), PROMPTS, options.pictures)
    return result


if __name__ == "__main__":
    run_command(main)
