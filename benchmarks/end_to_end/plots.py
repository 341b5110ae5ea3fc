"""A run's figures as pictures: what a picture's time is made of, and speed against likeness."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.end_to_end.figures import Figures
from engines.support.extras import need
from engines.support.files import atomic_file

__all__ = ["plot_all"]

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
    likeness = [figures for figures in rows if figures["psnr"] is not None and figures["variant"]]
    middle = sum(one["psnr"] for one in likeness) / max(1, len(likeness))
    for index, figures in enumerate(sorted(likeness, key=lambda one: one["ratio"])):
        point, right = (figures["psnr"], figures["ratio"]), figures["psnr"] > middle
        scatter.plot(*point, "o")
        offset = (-5 if right else 5, 6 if index % 2 else -10)
        scatter.annotate(figures["name"], point, offset, textcoords="offset points", fontsize=7, ha="right" if right else "left")
    scatter.set_xlabel("PSNR to original full, dB")
    scatter.set_ylabel("times as fast as original full")
    scatter.grid(alpha=0.3)
    scatter.margins(0.2)
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _label(figures: Figures) -> str:
    return f"{figures['name']}, {figures['engine']}" if figures["variant"] else figures["name"]
