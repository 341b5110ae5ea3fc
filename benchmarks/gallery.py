"""`python -m benchmarks.gallery`: one picture of pictures, a row for each UNet and plan, a column for each prompt.

Every row starts from the same noise, so that what changes down a column is the plan's doing.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

import runtime
from engines.command import run_command

__all__ = ["ROWS", "draw", "main"]

ROWS = (
    ("original", "full"),
    ("original", "block:3"),
    ("original", "deepcache:3"),
    ("assembled", "full"),
    ("assembled", "block:3"),
)
PROMPTS = (
    "a red star on a blue background",
    "a small green circle at the top left on a yellow background",
    "a large white triangle on a black background",
    "a yellow square on a green background",
    "a blue star and a red circle on a white background",
)


def draw(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str], path: Path) -> None:
    """Write a PNG of pictures in a grid with a name before each row and above each column."""
    import matplotlib as mpl
    from matplotlib import pyplot

    mpl.use("Agg")
    figure, axes = pyplot.subplots(
        len(rows), len(columns), figsize=(1.7 * len(columns) + 1.2, 1.6 * len(rows) + 0.4), squeeze=False
    )
    for (name, pictures), line in zip(rows, axes, strict=True):
        for column, picture, axis in zip(columns, pictures, line, strict=True):
            axis.imshow(picture, interpolation="bicubic")
            axis.set_xticks([])
            axis.set_yticks([])
            if name == rows[0][0]:
                axis.set_title(_wrapped(column), fontsize=7)
        line[0].set_ylabel(name, fontsize=8)
    figure.tight_layout(pad=0.6)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _wrapped(text: str, width: int = 24) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


def main(arguments: Sequence[str]) -> None:
    """Generate every picture and write the grid; raises UserError for a bundle that is not there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gallery", description=__doc__)
    parser.add_argument("--bundles", type=Path, default=Path("bundles"), help="folder of mini-original and mini-assembled")
    parser.add_argument("--out", type=Path, default=Path("docs/gallery.png"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    rows = []
    for variant, plan in ROWS:
        bundle = options.bundles / f"mini-{variant}"
        made = runtime.generate(list(PROMPTS), plan=plan, bundle=bundle, steps=options.steps, seed=options.seed)
        rows.append((f"{variant}\n{plan}", made.images))
    draw(rows, PROMPTS, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    run_command(main)
