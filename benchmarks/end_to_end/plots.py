"""A run's figures as pictures: what a picture's time is made of, and speed against likeness."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.end_to_end.figures import Figures
from engines.support.extras import need
from engines.support.files import atomic_file
from tuning.ranking.labels import place_label

__all__ = ["plot_all"]

_LEAST_SPAN = 4.0
"""Of the axis of PSNR, in dB."""
_PARTS = (("unet_seconds", "UNet"), ("vae_seconds", "VAE"), ("text_seconds", "text encoder"))


def plot_all(found: Sequence[Figures], path: Path, title: str) -> None:
    """Bars of a picture's time by part, the fastest last; and how many times as fast against PSNR to full.

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
    near = [figures for figures in rows if figures["psnr"] is not None and figures["variant"]]
    _scatter(scatter, near)
    figure.suptitle(title, fontsize=9)
    canvas.draw()  # where things are is known once they are laid out
    figure.set_layout_engine("none")
    _name_points(scatter, near)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _scatter(axis: Any, near: Sequence[Figures]) -> None:
    """How many times as fast as full each plan is, against how near its picture is to that of full."""
    for number, kind in enumerate(dict.fromkeys(map(_kind, near))):
        own = [figures for figures in near if _kind(figures) == kind]
        axis.scatter(*zip(*map(_point, own), strict=True), s=24, color=f"C{number}", label=kind)
    axis.set_xlabel("PSNR to original full, dB")
    axis.set_ylabel("times as fast as original full")
    axis.grid(alpha=0.3)
    axis.margins(0.2)
    low, high = axis.get_xlim()
    if high - low < _LEAST_SPAN:  # engines that make the same picture: no axis of a hundred-thousandth of a decibel
        axis.set_xlim((low + high - _LEAST_SPAN) / 2, (low + high + _LEAST_SPAN) / 2)
    if near:
        axis.legend(loc="best", fontsize=7)


def _name_points(axis: Any, near: Sequence[Figures]) -> None:
    """Each point's plan, in the colour of its variant and engine; to be called when the figure is laid out."""
    kinds = list(dict.fromkeys(map(_kind, near)))
    points = list(map(_point, near))
    for figures, point in zip(near, points, strict=True):
        place_label(axis, figures["plan"], point, points, f"C{kinds.index(_kind(figures))}")


def _point(figures: Figures) -> tuple[float, float]:
    return figures["psnr"], figures["ratio"]


def _kind(figures: Figures) -> str:
    return f"{figures['variant']}, {figures['engine']}"


def _label(figures: Figures) -> str:
    return f"{figures['name']}, {figures['engine']}" if figures["variant"] else figures["name"]
