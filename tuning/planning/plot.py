"""The plot of a front: speed across, likeness to the pictures of ``full`` up, with controls."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from engines.support.files import atomic_file
from tuning.planning.report import Row

__all__ = ["plot_front"]

_COLOURS = ("tab:red", "tab:grey", "tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown")


def plot_front(series: Mapping[str, Sequence[Row]], path: Path, title: str, measure: str) -> None:
    """Write the plot, in one move.

    Args:
        series: rows by what they have in common; the found plans come first.
        path: a .png file.
        title: how the pictures were made.
        measure: whose PSNR it is.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, rows) in zip(_COLOURS, series.items(), strict=False):
        points = sorted((1 / row.cost, row.psnr) for row in rows)
        style = "o-" if colour == _COLOURS[0] else "s--"
        axes.plot(*zip(*points, strict=True), style, color=colour, label=name, markersize=4, linewidth=1)
    axes.set_xlabel("speed of the UNet, times that of full, by cost")
    axes.set_ylabel(f"PSNR to the pictures of full, dB ({measure})")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
