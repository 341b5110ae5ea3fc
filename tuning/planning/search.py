"""The search: which points are tried, in which order, and which is taken."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial

from tuning.errors import TuningError
from tuning.planning.costs import Costs
from tuning.planning.gaps import LONGEST, Trajectories, gaps_of
from tuning.planning.optimise import Gaps, best_keys, climb, estimate
from tuning.planning.pictures import Pictures
from tuning.planning.progress import SearchProgress
from tuning.planning.space import Point, Space, uniform
from tuning.planning.state import State

__all__ = ["Search"]

_STARTS = 6
"""Choices of key steps, the best by their gaps' errors, that are tried before the local search."""
_ROUNDING = 1e-9


class Search:
    """Points with their cost and error, each measured once.

    Args:
        space: what can be chosen.
        pictures: to find plans with.
        costs: of plans.
        state: what was measured before, and is kept.
        progress: told what is done.
    """

    def __init__(self, space: Space, pictures: Pictures, costs: Costs, state: State, progress: SearchProgress) -> None:
        self.space, self._pictures, self._costs, self._state, self._progress = space, pictures, costs, state, progress
        self._trajectories: Trajectories | None = None
        self._gaps: Gaps | None = None
        self._known_costs: dict[Point, float] = {}

    def cost(self, point: Point) -> float:
        """As a share of that of ``full``."""
        if point not in self._known_costs:
            self._known_costs[point] = self._costs.of(self.space.plan(point))
        return self._known_costs[point]

    def error(self, point: Point) -> float:
        """Mean squared error of the final latents to those of ``full``."""
        error = self._state.get(f"error {_named(point)}", lambda: self._pictures.error(self.space.plan(point)))
        self._progress.did(self.cost(point) * self.space.steps)
        return error

    def psnr(self, point: Point) -> float:
        """Mean PSNR in dB of the pictures that the plan is found with."""
        return self._state.get(f"psnr {_named(point)}", lambda: self._pictures.psnr(self.space.plan(point)))

    def best(self, budget: float, tries: int) -> Point:
        """The point with the least error found at a cost of at most ``budget``.

        Raises:
            TuningError: nothing costs so little; says what costs least.
        """
        self._check_budget(budget)
        gaps = self.gaps(budget)
        with self._progress.stage(f"up to {tries} plans at a cost of {budget:.3g}", self.work(budget, tries)):
            start = min(self._starts(budget, gaps), key=self.error)
            others = self._starts(budget, gaps, start)
            return climb(
                min(others, key=self.error), lambda point: self._neighbours(point, gaps, budget), self.error, tries - len(others)
            )

    def cheapest(self, psnr: float, tries: int) -> Point:
        """The cheapest point found whose pictures are at least so near to those of ``full``, in dB.

        Raises:
            TuningError: none is; says how near they come.
        """
        budgets = self.budgets()
        self.gaps(budgets[len(budgets) // 2])
        nearest = self.best(budgets[-1], tries // 4)
        if self.psnr(nearest) < psnr:
            raise TuningError(
                f"no plan reaches {psnr:g} dB but full itself; the best found has {self.psnr(nearest):.1f} dB "
                f"at a cost of {self.cost(nearest):.3f}: ask for less"
            )
        low, high, found = 0, len(budgets) - 1, nearest
        while low < high:  # without a local search, by the sums of gaps alone
            middle = (low + high) // 2
            start = min(self._starts(budgets[middle], self.gaps(budgets[middle])), key=self.error)
            low, high, found = (low, middle, start) if self.psnr(start) >= psnr else (middle + 1, high, found)
        for budget in reversed(budgets[: high + 1]):
            point = self.best(budget, tries // 2)
            if self.psnr(point) < psnr:
                break
            found = point
        return found

    def budgets(self) -> list[float]:
        """The costs that numbers of key steps make, the least first."""
        counts = range(self._fewest, self.space.steps)
        return [min(self._cost_with(template, count) for template in self.space.templates()) for count in counts]

    def work(self, budget: float, tries: int) -> float:
        """Steps of the whole UNet that so many tries at a cost are worth."""
        return tries * budget * self.space.steps

    def gaps(self, budget: float) -> Gaps:
        """The error of each gap, where units are inherited in it and nowhere else; 0 where no step inherits.

        The units are those that are best where key steps are spread evenly, at the budget that is asked for first.
        """
        if self._gaps is None:
            self._gaps = self._measured_gaps(self._best_even(budget))
        return self._gaps

    def gap_work(self) -> float:
        """Steps of the whole UNet that all gaps are worth."""
        return sum(self._work(gap) for gap in gaps_of(self.space.steps))

    def _measured_gaps(self, template: Point) -> Gaps:
        found, every = {(key, key + 1): 0.0 for key in range(self.space.steps)}, list(gaps_of(self.space.steps))
        with self._progress.stage(f"{len(every)} gaps between key steps, {template.level}", self.gap_work()):
            for gap in every:
                found[gap] = self._state.get(f"gap {_named(template)} {gap[0]} {gap[1]}", partial(self._gap_error, template, gap))
                self._progress.did(self._work(gap))
        return found

    def _gap_error(self, template: Point, gap: tuple[int, int]) -> float:
        if self._trajectories is None:
            self._trajectories = Trajectories(self._pictures)
        keys = tuple(step for step in range(self.space.steps) if step not in range(gap[0] + 1, gap[1]))
        error = self._trajectories.error(self.space.plan(replace(template, keys=keys)), gap[0])
        return error if math.isfinite(error) else math.inf

    def _work(self, gap: tuple[int, int]) -> float:
        """Steps of the whole UNet that the measurement of a gap is worth."""
        steps, inherited = self.space.steps, gap[1] - gap[0] - 1
        saved = steps * (1 - self.budgets()[-1])
        return steps - gap[0] - inherited * saved

    @property
    def _fewest(self) -> int:
        return math.ceil(self.space.steps / LONGEST)

    def _cost_with(self, template: Point, count: int) -> float:
        return self.cost(replace(template, keys=uniform(self.space.steps, count)))

    def _affordable(self, template: Point, budget: float) -> int:
        """The most key steps that a budget allows, 0 where it allows too few."""
        counts = range(self.space.steps - 1, self._fewest - 1, -1)
        return next((count for count in counts if self._cost_with(template, count) <= budget + _ROUNDING), 0)

    def _check_budget(self, budget: float) -> None:
        if not any(self._affordable(template, budget) for template in self.space.templates()):
            raise TuningError(
                f"no plan costs {budget:g} or less; the cheapest costs {self.budgets()[0]:.3f}, with a key step "
                f"in {LONGEST}: ask for that"
            )

    def _best_even(self, budget: float) -> Point:
        """The template with the least error where its key steps are spread evenly."""
        counts = {template: self._affordable(template, budget) for template in self.space.templates()}
        evens = {
            template: replace(template, keys=uniform(self.space.steps, count)) for template, count in counts.items() if count
        }
        return min(evens, key=lambda template: self.error(evens[template]))

    def _starts(self, budget: float, gaps: Gaps, only: Point | None = None) -> list[Point]:
        """The best key steps of each template, or several choices of them for one, as far as errors of gaps add up."""
        templates, most = (self.space.templates(), 1) if only is None else ([replace(only, keys=())], _STARTS)
        return [
            replace(template, keys=keys)
            for template in templates
            if (count := self._affordable(template, budget))
            for keys in best_keys(gaps, self.space.steps, count, most)
        ]

    def _neighbours(self, point: Point, gaps: Gaps, budget: float) -> Iterator[Point]:
        fitted = (self._fitted(each, gaps, budget) for each in self.space.neighbours(point, gaps))
        return (each for each in fitted if each is not None)

    def _fitted(self, point: Point, gaps: Gaps, budget: float) -> Point | None:
        """A point with as many key steps as a budget allows: they are added and left out by the sum of the gaps' errors."""

        def total(each: Point) -> float:
            return estimate(gaps, self.space.steps, each.keys)

        while self.cost(point) > budget + _ROUNDING:
            fewer = list(self.space.with_fewer_keys(point))
            if len(point.keys) <= self._fewest or not fewer:
                return None
            point = min(fewer, key=total)
        while more := list(self.space.with_more_keys(point)):
            following = min(more, key=total)
            if self.cost(following) > budget + _ROUNDING or len(following.keys) == self.space.steps:
                break
            point = following
        return point


def _named(point: Point) -> str:
    """A point as the state's names have it."""
    return json.dumps(asdict(point))
