"""Pictures in a grid, a row for each UNet or plan and a column for each prompt."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

__all__ = ["PROMPTS", "draw"]

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
    return "\n".join(textwrap.wrap(text, width))
