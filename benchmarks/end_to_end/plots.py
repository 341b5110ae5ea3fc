"""A run's figures as pictures: what a picture's time is made of, and speed against likeness."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.end_to_end.figures import Figures
from engines.support.extras import need
from engines.support.files import atomic_file

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
    from matplotlib.figure import Figure

    rows = [figures for figures in found if "reason" not in figures]
    rows.sort(key=lambda figures: -figures["p50"])
    figure = Figure(figsize=(11, 1.6 + 0.32 * len(rows)), layout="constrained")
    bars, scatter = figure.subplots(1, 2, width_ratios=(3, 2))
    left = [0.0] * len(rows)
    names = [_label(figures) for figures in rows]
    for key, label in _PARTS:
        values = [figures[key] for figures in rows]
        bars.barh(names, values, left=left, label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]
    rest = [max(0.0, figures["p50"] - done) for figures, done in zip(rows, left, strict=True)]
    bars.barh(names, rest, left=left, label="the rest", color="lightgrey")
    bars.set_xlabel("seconds a picture, median")
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize=8)
    _scatter(scatter, rows)
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _scatter(axis: Any, rows: Sequence[Figures]) -> None:
    """How many times as fast as full each plan is, against how near its picture is to that of full; an engine has one colour."""
    near = [figures for figures in rows if figures["psnr"] is not None and figures["variant"]]
    engines = list(dict.fromkeys(figures["engine"] for figures in near))
    middle = sum(one["psnr"] for one in near) / max(1, len(near))
    for index, figures in enumerate(sorted(near, key=lambda one: one["ratio"])):
        point, right = (figures["psnr"], figures["ratio"]), figures["psnr"] > middle
        axis.plot(*point, "o", color=f"C{engines.index(figures['engine'])}")
        offset = (-5 if right else 5, 6 if index % 2 else -10)
        text = _label(figures) if len(engines) > 1 else figures["name"]
        axis.annotate(text, point, offset, textcoords="offset points", fontsize=7, ha="right" if right else "left")
    axis.set_xlabel("PSNR to original full, dB")
    axis.set_ylabel("times as fast as original full")
    axis.grid(alpha=0.3)
    axis.margins(0.2)
    low, high = axis.get_xlim()
    if high - low < _LEAST_SPAN:  # engines that make the same picture: no axis of a hundred-thousandth of a decibel
        axis.set_xlim(middle - _LEAST_SPAN / 2, middle + _LEAST_SPAN / 2)


def _label(figures: Figures) -> str:
    return f"{figures['name']}, {figures['engine']}" if figures["variant"] else figures["name"]
