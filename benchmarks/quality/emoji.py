"""`python -m benchmarks.quality.emoji`: how often a reader finds what was asked for in a model's emoji.

Pairs of concept and style that training saw, and pairs held back from it: both were seen there, never together. The reader learnt
from real pictures of training pairs alone; how right it is on the real pictures held back is the most that made ones can reach.
Beside them stand the same pictures encoded and decoded: what the autoencoder alone loses. Intervals are Wilson's, of 95 %.
"""

import json
import math
import random
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import machine, results_file
from engines.support.cli import Parser, quiet_libraries, run_command
from engines.support.files import write_text
from tuning.emoji.concepts import Icon
from tuning.emoji.reader import READER, Reader, load_reader, right
from tuning.emoji.samples import draw_pairs
from tuning.emoji.textures import Textures
from tuning.errors import TuningError
from tuning.mini.autoencoder import reconstruct
from tuning.training.teacher import Teacher

__all__ = ["MEASURES", "main", "measure", "wilson"]

RESULTS = Path("benchmarks/results/emoji.json")
MEASURES = ("concept_top1", "concept_top5", "style", "concept_and_style")
Figures = dict[str, dict[str, float]]


def wilson(hits: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval (Wilson 1927) of a share: never outside 0 to 1, and of some width even where all are right."""
    share, spread = hits / of, z * z / of
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / of + spread / (4 * of)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


@torch.no_grad()
def measure(reader: Reader, pictures: Tensor, concepts: Tensor, styles: Tensor) -> Figures:
    """Of pictures (n, 3, 128, 128) the share right in each of MEASURES, with how many, and its interval."""
    scored = [reader(part) for part in pictures.split(50)]
    found = torch.cat([c for c, _ in scored]), torch.cat([s for _, s in scored])
    first, style = right(found[0], concepts), right(found[1], styles)
    both = [a and b for a, b in zip(first, style, strict=True)]
    answers = dict(zip(MEASURES, (first, right(found[0], concepts, 5), style, both), strict=True))
    return {name: _figures(sum(each), len(each)) for name, each in answers.items()}


def _figures(hits: int, of: int) -> dict[str, float]:
    low, high = wilson(hits, of)
    return {"right": hits, "of": of, "share": round(hits / of, 4), "low": round(low, 4), "high": round(high, 4)}


def _shares(figures: Figures) -> list[str]:
    return [f"{each['share']:.1%} ({each['low']:.0%} to {each['high']:.0%})" for each in figures.values()]


def _table(rows: dict[str, dict[str, Figures]]) -> Table:
    table = Table(
        "pairs", "pictures", *(name.replace("_", " ") for name in MEASURES), title="right by the reader, 95 % intervals"
    )
    for pairs, kinds in rows.items():
        for kind, figures in kinds.items():
            table.add_row(pairs, kind, *_shares(figures))
    return table


def _options(arguments: Sequence[str]) -> Namespace:
    parser = Parser(prog="python -m benchmarks.quality.emoji", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/emoji"), help="the model folder (default: %(default)s)")
    parser.add_argument("--icons", type=Path, default=Path("runs/emoji/icons"), help="the sets (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=150, help="at most, seen and held back each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=3.0, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--real-only", action="store_true", help="draw nothing: only the reader's ceiling and the autoencoder")
    parser.add_argument("--out", type=results_file, default=str(RESULTS), help="the figures as JSON (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.pairs < 1 or options.steps < 1:
        raise TuningError(f"--pairs {options.pairs} --steps {options.steps}: give 1 or more of each")
    return options


def _check_classes(concepts: list[str], data: Textures) -> None:
    if concepts != data.concepts:
        raise TuningError(
            f"the model's reader knows {len(concepts)} concepts, and the sets have {len(data.concepts)}, not all the same: "
            "fetch the pinned sets with python -m tuning.emoji.fetch, or train a reader on these"
        )


def _made(model: Teacher, options: Namespace) -> Callable[[Sequence[Icon]], Tensor]:
    def draw(icons: Sequence[Icon]) -> Tensor:
        return draw_pairs(model, icons, steps=options.steps, guidance=options.guidance, seed=options.seed)

    return draw


def main(arguments: Sequence[str]) -> None:
    """Runs the command. Raises TuningError for a user's mistake."""
    options = _options(arguments)
    quiet_libraries()
    reader, concepts, _ = load_reader(options.model / READER)
    model = Teacher.load(str(options.model))
    data = Textures(options.icons, torch.device("cpu"))
    _check_classes(concepts, data)
    every = range(len(data.train))
    seen = random.Random("seen pairs").sample(every, min(options.pairs, len(every)))
    held = list(range(len(data.train), len(data.train) + len(data.held)))[: options.pairs]
    icons, console, draw = [*data.train, *data.held], Console(), _made(model, options)
    rows: dict[str, dict[str, Figures]] = {}
    for name, chosen in (("seen", seen), ("held back", held)):
        asked = [icons[row] for row in chosen]
        labels, real = data.labels(asked), data.plain(chosen)
        rows[name] = {"real": measure(reader, real, *labels)}
        rows[name]["encoded and decoded"] = measure(reader, reconstruct(model.vae, real, 25), *labels)
        if not options.real_only:
            rows[name]["made"] = measure(reader, draw(asked), *labels)
    console.print(_table(rows))
    settings = {name: getattr(options, name) for name in ("pairs", "steps", "guidance", "seed")} | {"model": str(options.model)}
    write_text(options.out, json.dumps({"settings": settings, "rows": rows} | machine(), indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
