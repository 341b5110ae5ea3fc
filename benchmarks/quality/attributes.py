"""`python -m benchmarks.quality.attributes`: how often pictures show what their prompt says, on prompts that training never saw.

Prompt i of the seeded list is sampled with seed i, so every row starts from the same noise. Bundles that are missing are
named with the command that builds them.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from benchmarks.machine import results_file, write_results
from benchmarks.quality.judge import draw_prompts, tensor_of
from benchmarks.quality.table import show
from engines.errors import UserError
from engines.support.cli import run_command
from engines.support.extras import need
from engines.support.files import atomic_file
from tuning.mini.reader_network import read_batch
from tuning.mini.reader_rules import read
from tuning.mini.reader_score import judge, shares
from tuning.mini.scenes import held_back_prompts, parse

__all__ = ["ROWS", "Row", "main", "measure"]

RESULTS = Path("benchmarks/results/attributes.json")


@dataclass(frozen=True)
class Row:
    """One line of the table: a bundle of the embedded model, and the plan that it runs."""

    variant: str
    plan: str

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.variant}, {self.plan}"


ROWS = (Row("original", "full"), Row("assembled", "full"), Row("original", "block:3"))


def measure(
    bundle: Path, plan: str, prompts: list[str], *, steps: int, guidance: float, engine: str
) -> tuple[dict[str, dict[str, float]], list[Image.Image], float]:
    """Shares of prompts right by each reader ("rules", "network"), the pictures, and seconds per picture."""
    started = time.perf_counter()
    pictures = draw_prompts(bundle, prompts, plan=plan, steps=steps, guidance=guidance, engine=engine)
    seconds = (time.perf_counter() - started) / len(prompts)
    asked = [parse(prompt) for prompt in prompts]
    seen = {"rules": [read(picture) for picture in pictures], "network": read_batch(tensor_of(pictures))}
    figures = {name: shares(judge(a, s) for a, s in zip(asked, each, strict=True)) for name, each in seen.items()}
    return figures, pictures, seconds


def _grid(pictures: list[Image.Image], path: Path, columns: int = 16) -> None:
    """Saves the first pictures side by side."""
    width, height = pictures[0].size
    rows = len(pictures) // columns
    sheet = Image.new("RGB", (columns * width, rows * height))
    for i, picture in enumerate(pictures[: rows * columns]):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        sheet.save(temporary)


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.attributes", description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="prompts (default: 500)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale (default: 3)")
    parser.add_argument("--engine", default="onnxruntime", help="default: onnxruntime")
    parser.add_argument("--bundles", type=Path, default=Path("bundles"), help="where mini-VARIANT bundles are")
    parser.add_argument("--out", type=results_file, default=str(RESULTS), help=f"default: {RESULTS}")
    parser.add_argument("--grids", type=Path, help="a folder for sheets of the first pictures of each row")
    return parser.parse_args(arguments)


def _run(args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    prompts = held_back_prompts(args.count)
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for row in ROWS:
        bundle = args.bundles / f"mini-{row.variant}"
        if not bundle.exists():
            print(f"{row.name}: no {bundle}; make it with: python -m exporter build --variant {row.variant}", file=sys.stderr)
            continue
        figures, pictures, seconds = measure(
            bundle, row.plan, prompts, steps=args.steps, guidance=args.guidance, engine=args.engine
        )
        rows[row.name] = figures | {"time": {"seconds_per_picture": round(seconds, 4)}}
        if args.grids:
            _grid(pictures, args.grids / f"{row.variant}-{row.plan.replace(':', '-')}.png")
    return rows


def main(arguments: Sequence[str]) -> None:
    """Runs the command. Raises UserError where no bundle is there, or what it needs is missing."""
    args = _arguments(arguments)
    need("scipy", "reading the pictures")
    rows = _run(args)
    if not rows:
        raise UserError(f"no bundle in {args.bundles}: nothing was measured")
    for reader in ("rules", "network"):
        title = f"{args.count} held-back prompts, {args.steps} steps, guidance {args.guidance}: right by the {reader} reader"
        show(title, {name: figures[reader] for name, figures in rows.items()})
    settings = {"prompts": args.count, "steps": args.steps, "guidance": args.guidance, "scheduler": "dpm++"}
    settings |= {"engine": args.engine, "dtype": "float32"}
    write_results(args.out, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    run_command(main)
