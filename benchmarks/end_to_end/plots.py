"""A run's figures as pictures: what a picture's time is made of, and speed against likeness."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.end_to_end.figures import Figures
from engines.errors import UserError
from engines.support.extras import need
from engines.support.files import atomic_file
from tuning.ranking.labels import place_label

__all__ = ["plot_again", "plot_all"]

_MOST = 50.0
"""PSNR in dB at which pictures nearer than that are drawn: no difference is seen any more."""
_PARTS = (("unet_seconds", "UNet"), ("vae_seconds", "VAE"), ("text_seconds", "text encoder"))


def plot_all(found: Sequence[Figures], path: Path, title: str) -> None:
    """Bars of a picture's time by part, the fastest last; and how many times as fast against PSNR to full, peers too.

    Raises:
        UserError: matplotlib is not installed.
    """
    need("matplotlib", "the plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [figures for figures in found if "reason" not in figures]
    rows.sort(key=lambda figures: -figures["p50"])
    figure = Figure(figsize=(11, 1.6 + 0.32 * len(rows)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    bars, scatter = figure.subplots(1, 2, width_ratios=(3, 2))
    left = [0.0] * len(rows)
    names = [_label(figures) for figures in rows]
    for key, label in _PARTS:
        values = [figures[key] for figures in rows]
        bars.barh(names, values, left=left, label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]
    rest = [max(0.0, figures["p50"] - done) for figures, done in zip(rows, left, strict=True)]
    bars.barh(names, rest, left=left, label="the rest", color="lightgrey")
    bars.margins(y=0.02)
    bars.set_xlabel("seconds a picture, median")
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize=8)
    near = [_against_first(figures, found) for figures in rows]
    _scatter(scatter, near)
    figure.suptitle(title, fontsize=9)
    canvas.draw()  # where things are is known once they are laid out
    figure.set_layout_engine("none")
    _name_points(scatter, near)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110)


def plot_again(path: Path) -> Path:
    """Draw the plots of a file of results again, beside it; returns their path.

    Raises:
        UserError: it is no file of results, or matplotlib is not installed.
    """
    try:
        rows = json.loads(path.read_text("utf-8"))["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of results of run_trt.py") from error
    plot_all(rows, path.with_suffix(".png"), path.stem)
    return path.with_suffix(".png")


def _against_first(figures: Figures, found: Sequence[Figures]) -> Figures:
    """A row with how many times as fast as ``original full`` of the first engine it is, and the PSNR to the pictures of that.

    Files that were written before the two were in them have the PSNR to the row's own engine's, which differs by rounding.
    """
    base = next((one for one in found if one["name"] == "original full" and "reason" not in one), figures)
    db = figures.get("reference_psnr") or figures["psnr"]
    overall = figures.get("overall", base["p50"] / figures["p50"])
    return figures | {"overall": overall, "near": _MOST if db is None else min(_MOST, db)}


def _scatter(axis: Any, near: Sequence[Figures]) -> None:
    """How many times as fast as full on the first engine each row is, against how near its picture is to that one's."""
    for number, kind in enumerate(dict.fromkeys(map(_kind, near))):
        own = [figures for figures in near if _kind(figures) == kind]
        axis.scatter(*zip(*map(_point, own), strict=True), s=24, color=f"C{number}", label=kind)
    axis.set_xlabel(f"PSNR to original full of the first engine,\ndB; {_MOST:g} stands for more")
    axis.set_ylabel("times as fast as original full of the first engine")
    axis.grid(alpha=0.3)
    axis.margins(0.2)
    if near:
        axis.legend(loc="best", fontsize=7)


def _name_points(axis: Any, near: Sequence[Figures]) -> None:
    """Each point's plan, or the peer's name, in the colour of its kind; to be called when the figure is laid out."""
    kinds = list(dict.fromkeys(map(_kind, near)))
    points = list(map(_point, near))
    for figures, point in zip(near, points, strict=True):
        place_label(
            axis, figures["plan"] if figures["variant"] else figures["name"], point, points, f"C{kinds.index(_kind(figures))}"
        )


def _point(figures: Figures) -> tuple[float, float]:
    return figures["near"], figures["overall"]


def _kind(figures: Figures) -> str:
    return f"{figures['variant']}, {figures['engine']}" if figures["variant"] else "peers"


def _label(figures: Figures) -> str:
    return f"{figures['name']}, {figures['engine']}" if figures["variant"] else figures["name"]
