"""Pictures in a grid, a row for each UNet or plan and a column for each prompt."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from engines.support.files import atomic_file
from runtime.images.pictures import picture_psnr

__all__ = ["draw", "draw_differences"]


def draw(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    columns: Sequence[str],
    path: Path,
    notes: Sequence[Sequence[str]] | None = None,
) -> None:
    """Write a PNG of pictures in a grid with a name before each row and above each column, and ``notes`` under pictures."""
    import matplotlib as mpl
    from matplotlib import pyplot

    mpl.use("Agg")
    figure, axes = pyplot.subplots(
        len(rows), len(columns), figsize=(1.7 * len(columns) + 1.2, 1.6 * len(rows) + 0.4), squeeze=False
    )
    for number, ((name, pictures), line) in enumerate(zip(rows, axes, strict=True)):
        for column, picture, axis, note in zip(columns, pictures, line, notes[number] if notes else columns, strict=True):
            axis.set_xlabel(note if notes else "", fontsize=7, labelpad=2)
            axis.imshow(picture, interpolation="bicubic")
            axis.set_xticks([])
            axis.set_yticks([])
            if number == 0:
                axis.set_title(_wrapped(column), fontsize=7)
        line[0].set_ylabel(name, fontsize=8)
    figure.tight_layout(pad=0.6)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=100)
    pyplot.close(figure)


def draw_differences(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str], path: Path) -> None:
    """As ``draw``; under each row but the first, how its pictures differ from the first row's, eight times as strong, in dB."""
    (name, reference), *others = rows
    lines, notes = [(name, reference)], [[""] * len(columns)]
    for other, pictures in others:
        differences = [_difference(one, two) for one, two in zip(pictures, reference, strict=True)]
        lines += [(other, pictures), ("x 8", [picture for picture, _ in differences])]
        notes += [[""] * len(columns), [f"{psnr:.0f} dB" for _, psnr in differences]]
    draw(lines, columns, path, notes)


def _difference(one: Image.Image, other: Image.Image) -> tuple[Image.Image, float]:
    """Grey where two pictures are alike, eight times their difference where not; and their PSNR in dB."""
    apart = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    return Image.fromarray((128 + 8 * apart).clip(0, 255).astype(np.uint8)), picture_psnr(one, other)


def _wrapped(text: str, width: int = 24) -> str:
    return "\n".join(textwrap.wrap(text, width))
