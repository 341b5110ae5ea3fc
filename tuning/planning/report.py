"""The report on found plans, with controls of the same cost beside them: as a table, and as a plot."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table

from engines.support.files import atomic_file
from runtime.errors import PlanError
from runtime.plans.plan import Plan
from runtime.plans.presets import find_plan
from tuning.planning.costs import Costs
from tuning.planning.evaluation import Pictures

__all__ = ["Row", "controls", "fewer_steps", "judge", "judge_found", "plot_front", "table"]

_SPACINGS = range(2, 7)
_GATES = (0.2, 0.4, 0.6, 0.8)
_NAMES = "red", "grey", "blue", "orange", "green", "purple", "brown", "pink", "olive", "cyan"
_COLOURS = (*(f"tab:{name}" for name in _NAMES), "black")


@dataclass(frozen=True)
class Row:
    """A plan, or fewer steps of the scheduler, with its cost and PSNR in dB to the pictures of ``full``.

    ``psnr`` is that of prompts that no plan was found with, if there are any; ``found`` that of those it was found with.
    """

    name: str
    cost: float
    psnr: float
    found: float | None = None


def judge_found(name: str, plan: Plan, cost: float, pictures: Sequence[Pictures]) -> Row:
    """The figures of a plan that was found; ``pictures`` are those that it was found with, and others if there are any."""
    values = [each.psnr(plan) for each in pictures]
    return Row(name, cost, values[-1], values[0])


def judge(name: str, plan: Plan, cost: float, pictures: Sequence[Pictures], steps: int | None = None) -> Row:
    """The figures of a control, by the last of the ``pictures``."""
    return Row(name, cost, pictures[-1].psnr(plan, steps))


def controls(costs: Costs, levels: Sequence[str]) -> Iterator[tuple[str, Plan, float]]:
    """Presets whose key steps are spread evenly, or are dense late, and T-GATE, with their costs."""
    spaced = (f"{name}:{every}" for name in (*levels, "forecast", "back", "skip") for every in _SPACINGS)
    for name in (*spaced, *(f"tgate:{share}" for share in _GATES)):
        try:
            plan = find_plan(name)
            yield plan.name, plan, costs.of(plan)
        except PlanError:  # the bundle is not partitioned for it
            continue


def fewer_steps(steps: int, cost: float) -> int:
    """Steps of the scheduler that cost as much as a plan does, about."""
    return max(1, min(steps - 1, round(cost * steps)))


def table(rows: Sequence[Row], counts: Sequence[int]) -> Table:
    """Costs and PSNR of plans; ``counts`` are the prompts of each column."""
    columns = [f"dB, {count} {words}" for count, words in zip(counts, ("prompts it was found with", "others"), strict=False)]
    made = Table("plan", "cost", *columns, box=SIMPLE)
    for row in rows:
        values = [row.found, row.psnr] if len(counts) > 1 else [row.psnr]
        made.add_row(row.name, f"{row.cost:.3f}", *("-" if value is None else f"{value:.1f}" for value in values))
    return made


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
    for colour, (name, rows) in zip(cycle(_COLOURS), series.items(), strict=False):
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
