"""The report on found plans, with controls of the same cost beside them: as a table, and as a plot."""

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
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

__all__ = [
    "NEAR",
    "Row",
    "bootstrap",
    "control_series",
    "controls",
    "decided",
    "fewer_steps",
    "judge_found",
    "judging_work",
    "plot_front",
    "same_cost",
    "table",
]

_SPACINGS = range(2, 7)
_SPACED = ("forecast", "quadratic", "back", "random", "skip")
_GATES = (0.2, 0.4, 0.6, 0.8)
_CHANGES = (0.05, 0.1, 0.2, 0.3, 0.5)
"""Of features, at which adaptive rules compute afresh."""
NEAR = 0.06
"""Costs of controls that stand beside a plan, at most so far from its own."""
_RESAMPLES = 2000
_NAMES = "red", "grey", "blue", "orange", "green", "purple", "brown", "pink", "olive", "cyan"
_COLOURS = (*(f"tab:{name}" for name in _NAMES), "black", "gold", "navy", "lime", "teal")


@dataclass(frozen=True)
class Row:
    """A plan, or fewer steps of the scheduler, with its cost and PSNR in dB to the pictures of ``full``.

    ``psnr`` is the mean over prompts that no plan was found with, if there are any, with its interval of 95 %; ``found`` that
    of those it was found with.
    """

    name: str
    cost: float
    psnr: float
    psnr_low: float
    psnr_high: float
    found: float | None = None

    @classmethod
    def of(cls, name: str, cost: float, decibels: Sequence[float], found: float | None = None) -> "Row":
        """A row by the PSNR of each picture."""
        return cls(name, cost, statistics.fmean(decibels), *bootstrap(decibels), found)


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The interval of 95 % of the values' mean: percentiles of the means of samples that are drawn from them with repetition."""
    generator = random.Random(0)
    means = sorted(statistics.fmean(generator.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return means[round(0.025 * _RESAMPLES)], means[round(0.975 * _RESAMPLES) - 1]


Tick = Callable[[], None]


def judge_found(name: str, plan: Plan, cost: float, pictures: Sequence[Pictures], tick: Tick) -> Row:
    """The figures of a plan that was found; ``pictures`` are those that it was found with, and others if there are any.

    ``tick`` is called after every call.
    """
    values = [each.decibels(plan, tick=tick).tolist() for each in pictures]
    return Row.of(name, cost, values[-1], statistics.fmean(values[0]))


def _judge(name: str, plan: Plan, cost: float, pictures: Sequence[Pictures], tick: Tick, steps: int | None = None) -> Row:
    """The figures of a control, by the last of the ``pictures``."""
    return Row.of(name, cost, pictures[-1].decibels(plan, steps, tick).tolist())


def _judge_decided(name: str, plan: Plan, pictures: Sequence[Pictures], tick: Tick) -> Row:
    """The figures of a control that decides while it runs, whose cost is therefore measured too, as a share of the MACs."""
    decibels, cost = pictures[-1].decided(plan, tick)
    return Row.of(name, cost, decibels.tolist())


def controls(costs: Costs, levels: Sequence[str]) -> Iterator[tuple[str, Plan, float]]:
    """Presets whose key steps are spread evenly, around the first third (DeepCache's non-uniform ones), late or at random, and
    T-GATE, with their costs.
    """
    spaced = (f"{name}:{every}" for name in (*levels, *_SPACED) for every in _SPACINGS)
    for name in (*spaced, *(f"tgate:{share}" for share in _GATES)):
        try:
            plan = find_plan(name)
            yield plan.name, plan, costs.of(plan)
        except PlanError:  # the bundle is not partitioned for it
            continue


def decided(pictures: Pictures) -> Iterator[tuple[str, Plan]]:
    """Presets that decide while they run, for whole calls, so that they are judged with one picture in each."""
    if pictures.pipeline.is_static:
        return
    options = pictures.options
    for change in _CHANGES:
        for name in (f"adaptive:{change}", f"first:{change}"):
            try:
                plan = find_plan(name)
                pictures.pipeline.schedule(plan, [1000 * (1 - step / options["steps"]) for step in range(options["steps"])])
                yield name, plan
            except PlanError:  # the bundle is not partitioned for it
                continue


def fewer_steps(steps: int, cost: float) -> int:
    """Steps of the scheduler that cost as much as a plan does, about."""
    return max(1, min(steps - 1, round(cost * steps)))


def table(rows: Sequence[Row], counts: Sequence[int]) -> Table:
    """Costs and PSNR of plans; ``counts`` are the prompts of each column."""
    columns = [f"dB, {count} {words}" for count, words in zip(counts, ("prompts it was found with", "others"), strict=False)]
    made = Table("plan", "cost", *columns, "95 %", box=SIMPLE)
    for row in rows:
        own = ["-" if row.found is None else f"{row.found:.1f}"] if len(counts) > 1 else []
        made.add_row(row.name, f"{row.cost:.3f}", *own, f"{row.psnr:.1f}", f"{row.psnr_low:.1f} to {row.psnr_high:.1f}")
    return made


def same_cost(
    costs: Costs, levels: Sequence[str], steps: int, cost: float, pictures: Sequence[Pictures], tick: Tick
) -> list[Row]:
    """Controls that cost about as much: fewer steps of the scheduler, and the nearest of each preset."""
    fewer = fewer_steps(steps, cost)
    rows = [_judge(f"{fewer} steps", find_plan("full"), fewer / steps, pictures, tick, fewer)]
    nearest: dict[str, tuple[str, Plan, float]] = {}
    for preset in sorted(controls(costs, levels), key=lambda preset: abs(preset[2] - cost)):
        if abs(preset[2] - cost) < NEAR:
            nearest.setdefault(preset[0].partition(":")[0], preset)
    return rows + [_judge(*preset, pictures, tick) for preset in nearest.values()]


def control_series(
    costs: Costs,
    levels: Sequence[str],
    steps: int,
    budgets: Sequence[float],
    pictures: Sequence[Pictures],
    tick: Tick,
    adaptive: bool,
) -> dict[str, list[Row]]:
    """All controls by their kinds; those that decide while they run only if ``adaptive``, for their cost is one of MACs."""
    counts = sorted({fewer_steps(steps, budget) for budget in budgets})
    found = {"fewer steps": [_judge(f"{n} steps", find_plan("full"), n / steps, pictures, tick, n) for n in counts]}
    for name, plan, cost in controls(costs, levels):
        found.setdefault(name.partition(":")[0], []).append(_judge(name, plan, cost, pictures, tick))
    for name, plan in decided(pictures[-1]) if adaptive else ():
        found.setdefault(name.partition(":")[0], []).append(_judge_decided(name, plan, pictures, tick))
    return found


def judging_work(pictures: Sequence[Pictures], steps: int, found: Sequence[float], others: Sequence[float]) -> float:
    """Steps of the whole UNet, for all of the first pictures, that judging is worth.

    Args:
        pictures: those that plans were found with, and others if there are any.
        steps: evaluations of ``full``, whose pictures are made for each.
        found: costs of the plans that were found, as shares of that of ``full``.
        others: costs of controls, which the last of the pictures judge.
    """
    counts = [len(each.prompts) / len(pictures[0].prompts) for each in pictures]
    return steps * (sum(counts) * (1 + sum(found)) + counts[-1] * sum(others))


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
        ordered = sorted(rows, key=lambda row: -row.cost)
        around = [[row.psnr - row.psnr_low for row in ordered], [row.psnr_high - row.psnr for row in ordered]]
        points = [1 / row.cost for row in ordered], [row.psnr for row in ordered]
        style = "o-" if colour == _COLOURS[0] else "s--"
        axes.errorbar(*points, around, fmt=style, color=colour, label=name, markersize=4, linewidth=1, capsize=2)
    axes.set_xlabel("speed of the UNet, times that of full, by cost")
    axes.set_ylabel(f"PSNR to the pictures of full, dB ({measure})")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
