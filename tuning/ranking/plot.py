"""The plot of a ranking: time saved across, error up, a point for each removal, the chosen ones named."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines.bundle.names import ATTENTION
from engines.support.files import atomic_file
from tuning.ranking.labels import place_label
from tuning.ranking.rank import NOTHING, Chosen, Ranked

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_ranking"]

_KINDS = {"skip pair": "tab:blue", "attention": "tab:orange", "mid block": "tab:green", "innermost stage": "tab:red"}

_DPI = 130
_LEAST = 1e-10  # an error of 0 has no place on a logarithmic axis


def _kind(each: Ranked) -> str:
    names = each.candidate.remove
    if names[0].endswith(ATTENTION):
        return "attention"
    if names == ("mid",):
        return "mid block"
    return "skip pair" if ".layer." in names[0] else "innermost stage"


def _label(axes: "Axes", ranked: Sequence[Ranked], steps: dict[str, int]) -> None:
    """Name every point: those that were chosen first, so that their names are nearest to them."""
    points = {each.candidate.name: (100 * each.share, max(each.error, _LEAST)) for each in ranked}
    for name in sorted(points, key=lambda name: (steps.get(name, len(points)), -points[name][0])):
        text = f"  {steps[name]}. {name}" if name in steps else name
        weight = "bold" if name in steps else "normal"
        place_label(axes, text, points[name], list(points.values()), "black", fontsize=6, fontweight=weight)


def plot_ranking(ranked: Sequence[Ranked], chosen: Sequence[Chosen], path: Path, title: str) -> None:
    """Write the plot to `path`, in one move."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7.6), dpi=_DPI, layout="constrained")
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
    axes.axhline(NOTHING, color="grey", lw=0.8, ls=":", label=f"less error counts as {NOTHING:g}")
    axes.set_yscale("log")
    axes.margins(x=0.2, y=0.12)  # room for the names
    axes.set_xlabel("share of the UNet's time (%)")
    axes.set_ylabel("relative mean squared error of the prediction, before distillation")
    axes.set_title(title, fontsize=10)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # where things are is known once they are laid out
    figure.set_layout_engine("none")
    _label(axes, ranked, steps)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})
