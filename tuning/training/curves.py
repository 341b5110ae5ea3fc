"""A run's curves and sample pictures, as files."""

import json
from pathlib import Path

import torch
from torch import Tensor

from engines.support.files import atomic_file

__all__ = ["draw_curves", "write_grid"]

_PARTS = ("loss", "noise", "output", "features")


def draw_curves(log: Path, path: Path) -> None:
    """Draws the losses of a metrics file in JSON lines, in training and in validation, as one PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = plt.subplots(1, len(_PARTS), figsize=(16, 3.6), layout="constrained")
    for name, axis in zip(_PARTS, axes, strict=True):
        for key, style, words in ((name, "-", "training"), (f"valid_{name}", "o-", "validation, averaged weights")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=words, linewidth=1, markersize=3)
        axis.set(title=name, xlabel="step", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    plt.close(figure)


def write_grid(pictures: Tensor, path: Path, columns: int = 8) -> None:
    """Writes pictures (n, 3, h, w) in [-1, 1] as one PNG, `columns` in a row, in one move."""
    from PIL import Image

    columns = min(columns, len(pictures))
    missing = -len(pictures) % columns
    filled = torch.cat([pictures, torch.ones(missing, *pictures.shape[1:])])
    rows = filled.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        Image.fromarray(((rows + 1) * 127.5).round().to(torch.uint8).numpy()).save(temporary, format="PNG")
