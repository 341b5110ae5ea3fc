"""The plot of a ranking: time saved across, error up, a point for each removal, the chosen ones named."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines.support.files import atomic_file
from tuning.ranking.rank import NOTHING, Chosen, Ranked

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_ranking"]

_KINDS = {"skip pair": "tab:blue", "attention": "tab:orange", "mid block": "tab:green", "innermost stage": "tab:red"}

_LEAST = 1e-10  # an error of 0 has no place on a logarithmic axis
_LINE, _WIDTH = 0.24, 2.2  # a label's height in powers of ten, and its width in percent, about


def _kind(each: Ranked) -> str:
    names = each.candidate.remove
    if names[0].endswith(".attention"):
        return "attention"
    if names == ("mid",):
        return "mid block"
    return "skip pair" if ".layer." in names[0] else "innermost stage"


def _label(axes: "Axes", ranked: Sequence[Ranked], steps: dict[str, int]) -> None:
    """Name every point; names that would lie on one another are moved up, with a line to their point."""
    taken: list[tuple[float, float]] = []
    for each in sorted(ranked, key=lambda one: one.error):
        number = f"{steps[each.candidate.name]}. " if each.candidate.name in steps else ""
        x, y = 100 * each.share, max(each.error, _LEAST)
        height = math.log10(y)
        while any(abs(height - other) < _LINE and abs(x - at) < _WIDTH for at, other in taken):
            height += _LINE / 4
        taken.append((x, height))
        axes.annotate(
            number + each.candidate.name, (x, y), (x + 0.2, 10**height), fontsize=6, fontweight="bold" if number else "normal",
            va="center", arrowprops={"arrowstyle": "-", "lw": 0.3, "color": "grey"},
        )  # fmt: skip


def plot_ranking(ranked: Sequence[Ranked], chosen: Sequence[Chosen], path: Path, title: str) -> None:
    """Write the plot to `path`, in one move."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    steps = {step.name: i for i, step in enumerate(chosen, 1)}
    for kind, colour in _KINDS.items():
        some = [each for each in ranked if _kind(each) == kind]
        x, y = [100 * each.share for each in some], [max(each.error, _LEAST) for each in some]
        spread = [50 * each.spread for each in some]
        axes.errorbar(x, y, xerr=spread, fmt="o", ms=4, lw=0.8, color=colour, label=kind)
    taken = [each for each in ranked if each.candidate.name in steps]
    x, y = [100 * each.share for each in taken], [max(each.error, _LEAST) for each in taken]
    axes.scatter(x, y, s=110, facecolors="none", edgecolors="black", label="chosen, in this order")
    _label(axes, ranked, steps)
    axes.axhline(NOTHING, color="grey", lw=0.8, ls=":")
    axes.set_yscale("log")
    axes.margins(x=0.12, y=0.1)  # room for the names
    axes.set_xlabel("share of the UNet's time (%)")
    axes.set_ylabel("relative mean squared error of the prediction, before distillation")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
