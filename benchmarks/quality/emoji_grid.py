"""`python -m benchmarks.quality.emoji_grid`: ten concepts in every style, as a picture; pairs held back from training are marked.

The concepts are drawn by lot from those of the held-back pairs, so each has one style in which the model never saw it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import results_file
from benchmarks.quality.grid import draw
from benchmarks.quality.judge import Judge, check_source, draw_prompts
from engines import Bundle, UserError
from engines.support.cli import Parser, quiet_libraries, run_command
from engines.support.extras import need
from tuning.emoji.concepts import Pair
from tuning.emoji.pairs import some_pairs

__all__ = ["main", "rows_of"]


def rows_of(judge: Judge, concepts: int) -> dict[str, list[Pair]]:
    """Of each style the pairs with so many concepts, the same ones and in one order for all."""
    chosen = [pair.concept for pair in some_pairs(judge.held, concepts, "a grid")]
    return {style: [Pair(concept, style) for concept in chosen] for style in judge.styles}


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.quality.emoji_grid", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/emoji"), help="model of the pairs (default: %(default)s)")
    parser.add_argument("--bundle", type=Path, default=Path("bundles/emoji-original"), help="draws them (default: %(default)s)")
    parser.add_argument("--concepts", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of DPM++ (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=3.0, help="(default: %(default)s)")
    parser.add_argument("--out", type=results_file, default="docs/emoji.png", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.concepts < 1 or options.steps < 1:
        raise UserError(f"--concepts {options.concepts} --steps {options.steps}: give 1 or more of each")
    return options


def main(arguments: Sequence[str]) -> None:
    """Draw the grid; raises UserError where the model or the bundle is missing, or one is not of the other."""
    options = _options(arguments)
    need("matplotlib", "the grid")
    quiet_libraries()
    judge = Judge.of(options.model)
    check_source(Bundle.open(options.bundle).manifest.source, options.bundle, options.model)
    rows, held = rows_of(judge, options.concepts), set(judge.held)
    prompts = [pair.prompt for pairs in rows.values() for pair in pairs]
    made = iter(draw_prompts(options.bundle, prompts, steps=options.steps, guidance=options.guidance))
    pictures = [(style, [next(made) for _ in pairs]) for style, pairs in rows.items()]
    notes = [["held back" if pair in held else "" for pair in pairs] for pairs in rows.values()]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(pictures, [pair.concept for pair in next(iter(rows.values()))], options.out, notes)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    run_command(main)
