"""`python -m benchmarks.quality.emoji`: how often a reader finds what was asked for in a model's emoji.

Pairs of concept and style that training saw, and pairs held back from it: both were seen there, never together. The reader learnt
from real pictures of training pairs alone; how right it is on the real pictures held back is the most that made ones can reach.
Beside them stand the same pictures encoded and decoded: what the autoencoder alone loses. Intervals are Wilson's, of 95 %.
Frechet and kernel distances are those to the real pictures of all other training pairs, in the reader's features.
"""

import json
import random
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import machine, results_file
from benchmarks.quality.judge import MEASURES, Judge, distances, shares
from engines.support.cli import Parser, quiet_libraries, run_command
from engines.support.files import write_text
from tuning.emoji.pictures import Textures
from tuning.emoji.samples import draw_pairs
from tuning.errors import TuningError
from tuning.mini.autoencoder import reconstruct
from tuning.training.teacher import Teacher

__all__ = ["main"]

RESULTS = Path("benchmarks/results/emoji.json")
_DISTANCES = ("frechet", "kernel")


def _table(rows: dict[str, dict[str, Any]]) -> Table:
    table = Table(
        "pairs", "pictures", *(name.replace("_", " ") for name in MEASURES), *_DISTANCES,
        title="right by the reader, 95 % intervals; distances to other real pictures",
    )  # fmt: skip
    for pairs, kinds in rows.items():
        for kind, figures in kinds.items():
            shares = [figures[name] for name in MEASURES]
            cells = [f"{each['share']:.1%} ({each['low']:.0%} to {each['high']:.0%})" for each in shares]
            table.add_row(pairs, kind, *cells, *(f"{figures[name]:.2f}" for name in _DISTANCES))
    return table


def _options(arguments: Sequence[str]) -> Namespace:
    parser = Parser(prog="python -m benchmarks.quality.emoji", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/emoji"), help="the model folder (default: %(default)s)")
    parser.add_argument("--icons", type=Path, default=Path("runs/emoji/icons"), help="the sets (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=150, help="pairs at most, seen and held back each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=3.0, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    parser.add_argument("--real-only", action="store_true", help="draw nothing: only the reader's ceiling and the autoencoder")
    parser.add_argument("--out", type=results_file, default=str(RESULTS), help="the figures as JSON (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.pairs < 1 or options.steps < 1:
        raise TuningError(f"--pairs {options.pairs} --steps {options.steps}: give 1 or more of each")
    return options


def _check_classes(judge: Judge, data: Textures) -> None:
    if list(judge.concepts) != data.concepts:
        raise TuningError(
            f"the model's reader knows {len(judge.concepts)} concepts, and the sets have {len(data.concepts)}, not all the same: "
            "fetch the pinned sets with python -m tuning.emoji.fetch, or train a reader on these"
        )


def _sets(model: Teacher, data: Textures, rows: Sequence[int], options: Namespace) -> dict[str, Tensor]:
    """Pictures of the same pairs: real ones, those encoded and decoded, and made ones."""
    icons, real = [*data.train, *data.held], data.plain(rows)
    found = {"real": real, "encoded and decoded": reconstruct(model.vae, real, 25)}
    if not options.real_only:
        asked = [icons[row] for row in rows]
        found["made"] = draw_pairs(model, asked, steps=options.steps, guidance=options.guidance, seed=options.seed)
    return found


def main(arguments: Sequence[str]) -> None:
    """Runs the command. Raises TuningError for a user's mistake."""
    options = _options(arguments)
    quiet_libraries()
    judge, model = Judge.of(options.model), Teacher.load(str(options.model))
    data = Textures(options.icons, torch.device("cpu"))
    _check_classes(judge, data)
    every, first = range(len(data.train)), len(data.train)
    seen = random.Random("seen pairs").sample(every, min(options.pairs, len(every)))
    held = list(range(first, first + min(options.pairs, len(data.held))))
    icons, others = [*data.train, *data.held], data.plain(sorted({*every} - {*seen}))
    rows: dict[str, dict[str, Any]] = {}
    for name, chosen in (("seen", seen), ("held back", held)):
        sets = _sets(model, data, chosen, options)
        away = distances(judge.reader, others, list(sets.values()))
        scores = [shares(judge.answers(pictures, [icons[row] for row in chosen])) for pictures in sets.values()]
        rows[name] = dict(zip(sets, (score | far for score, far in zip(scores, away, strict=True)), strict=True))
    Console().print(_table(rows))
    settings = {name: getattr(options, name) for name in ("pairs", "steps", "guidance", "seed")} | {"model": str(options.model)}
    write_text(options.out, json.dumps({"settings": settings, "rows": rows} | machine(), indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
