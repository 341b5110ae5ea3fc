"""The search: which points are tried, in which order, and which is taken."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial

from tuning.errors import TuningError
from tuning.planning.costs import Costs
from tuning.planning.estimate import INHERIT, SKIP, Errors, Estimate, gaps_of
from tuning.planning.evaluation import Pictures
from tuning.planning.gaps import Trajectories
from tuning.planning.optimise import climb
from tuning.planning.progress import SearchProgress
from tuning.planning.space import COORDINATES, Coordinate, Point, Space, uniform
from tuning.planning.state import State

__all__ = ["Search"]

_STARTS = 4
"""Points with the least sums of errors that are tried before the local search, for gaps of each kind and for both."""
_MOST_NEIGHBOURS = 30
"""Of a point along one coordinate, that are tried."""
_LEAST_KEYS = 8
"""One step in so many is a key step at least."""
_REGULAR = 0.1
"""How much less than the budget a regular plan may cost to be tried."""
_ROUNDING = 1e-9
_FEW = 4
"""Pictures that show what is clearly worse."""
_PROMISING = 0.5
"""About the share of points tried that are not clearly worse."""


class Search:
    """Points with their cost and error, each measured once.

    Args:
        space: what can be chosen.
        pictures: to find plans with. Gaps between key steps are measured on the first few, and a point that is clearly worse
            than the best one on these is not tried on the others.
        costs: of plans.
        state: what was measured before, and is kept.
        progress: told what is done.
    """

    def __init__(self, space: Space, pictures: Pictures, costs: Costs, state: State, progress: SearchProgress) -> None:
        self.space, self._pictures, self._costs, self._state, self._progress = space, pictures, costs, state, progress
        self._few = pictures.some(_FEW)
        self._share = len(self._few.prompts) / len(pictures.prompts)
        self._trajectories: Trajectories | None = None
        self._estimate: Estimate | None = None
        self._known_costs: dict[object, float] = {}

    def cost(self, point: Point) -> float:
        """As a share of that of ``full``."""
        alike = _alike(point)
        if alike not in self._known_costs:
            self._known_costs[alike] = self._costs.of(self.space.plan(point))
        return self._known_costs[alike]

    def error(self, point: Point) -> float:
        """The typical error of the final latents to those of ``full``."""
        error = self._state.get(f"error {_named(point)}", lambda: self._pictures.error(self.space.plan(point)))
        self._progress.did(self.cost(point) * self.space.steps)
        return error

    def rough_error(self, point: Point) -> float:
        """The typical error of the first few pictures."""
        if self._few is self._pictures:
            return self.error(point)
        error = self._state.get(f"few {_named(point)}", lambda: self._few.error(self.space.plan(point)))
        self._progress.did(self._share * self.cost(point) * self.space.steps)
        return error

    def psnr(self, point: Point) -> float:
        """Mean PSNR in dB of the pictures that the plan is found with."""
        return self._state.get(f"psnr {_named(point)}", lambda: self._pictures.psnr(self.space.plan(point)))

    def best(self, budget: float, tries: int) -> Point:
        """The point with the least error found at a cost of at most ``budget``.

        Raises:
            TuningError: nothing costs so little; says what costs least.
        """
        self.check_budget(budget)
        estimate = self.estimate(budget)
        with self._progress.stage(f"up to {tries} plans at a cost of {budget:.3g}", self.work(budget, tries)):
            starts = self._starts(budget, _STARTS)
            moves = [partial(self._neighbours, coordinate, estimate, budget) for coordinate in COORDINATES]
            return climb(starts, moves, self.error, self.rough_error, max(0, tries - len(starts)))

    def cheapest(self, psnr: float, tries: int) -> Point:
        """The cheapest point found whose pictures are at least so near to those of ``full``, in dB.

        Raises:
            TuningError: none is; says how near they come.
        """
        budgets = self.budgets()
        self.estimate(budgets[len(budgets) // 2])
        nearest = self.best(budgets[-1], tries // 4)
        if self.psnr(nearest) < psnr:
            raise TuningError(
                f"no plan reaches {psnr:g} dB but full itself; the best found has {self.psnr(nearest):.1f} dB "
                f"at a cost of {self.cost(nearest):.3f}: ask for less"
            )
        low, high, found = 0, len(budgets) - 1, nearest
        while low < high:  # without a local search, by sums of errors alone
            middle = (low + high) // 2
            start = min(self._starts(budgets[middle], 1), key=self.rough_error)
            low, high, found = (low, middle, start) if self.psnr(start) >= psnr else (middle + 1, high, found)
        for budget in reversed(budgets[: high + 1]):
            point = self.best(budget, tries // 2)
            if self.psnr(point) < psnr:
                break
            found = point
        return found

    def budgets(self) -> list[float]:
        """The costs that numbers of key steps make, the least first."""
        return [self.cost(self._skipping(count)) for count in range(self._fewest, self.space.steps)]

    def check_budget(self, budget: float) -> None:
        """Raise TuningError where nothing costs so little; it says what costs least."""
        least = self.budgets()[0]
        if budget < least - _ROUNDING:
            cheapest = math.ceil(least * 1000) / 1000  # rounded up: what is named can be had
            raise TuningError(
                f"no plan costs {budget:g} or less; the cheapest costs {cheapest:.3f}, with {self._fewest} key steps: "
                "ask for that"
            )

    def work(self, budget: float, tries: int) -> float:
        """Steps of the whole UNet for all pictures that so many tries at a cost are worth, about."""
        share = 1.0 if self._few is self._pictures else self._share + _PROMISING
        return tries * share * budget * self.space.steps

    def gap_work(self) -> float:
        """Steps of the whole UNet for all pictures that all gaps are worth, with what they start from."""
        gaps = sum(self._work(kind, gap) for kind in self._kinds() for gap in gaps_of(self.space.steps, kind))
        # Of the first few pictures: trajectories and latents of full, and a run of each template.
        return gaps + self._share * self.space.steps * (2 + len(self._templates()))

    def estimate(self, budget: float) -> Estimate:
        """The errors of gaps; the units that they inherit are those that are best at the budget that is asked for first."""
        if self._estimate is None:
            template = self._best_template(budget)
            errors = {kind: self._measured(kind, template) for kind in self._kinds()}
            self._estimate = Estimate(self.space.steps, errors, {kind: self._step_cost(kind, template) for kind in errors})
            self._template = template
        return self._estimate

    def _kinds(self) -> tuple[str, ...]:
        return (INHERIT, SKIP) if self.space.levels else (SKIP,)

    def _measured(self, kind: str, template: Point) -> Errors:
        every = list(gaps_of(self.space.steps, kind))
        what = "steps skipped" if kind == SKIP else f"{template.level} inherited, forecast by {template.damping:g}"
        with self._progress.stage(f"{len(every)} gaps between key steps, {what}", sum(self._work(kind, gap) for gap in every)):
            return {gap: self._gap(kind, template, gap) for gap in every}

    def _gap(self, kind: str, template: Point, gap: tuple[int, int]) -> float:
        """The error where only the steps of one gap inherit or are skipped, and those before the gap were run as by ``full``."""
        key, following = gap
        inside = tuple(range(key + 1, following))
        keys = tuple(step for step in range(self.space.steps) if step not in inside)
        point = self.space.normal(replace(template, keys=keys, skips=inside if kind == SKIP else ()))
        # What is forecast is read from two key steps.
        first = max(0, key - 1)
        error = self._state.get(f"few gap {_named(point)}", partial(self._trajectory_error, point, first))
        self._progress.did(self._work(kind, gap))
        return error

    def _trajectory_error(self, point: Point, first: int) -> float:
        if self._trajectories is None:
            self._trajectories = Trajectories(self._few)
        error = self._trajectories.error(self.space.plan(point), first)
        return error if math.isfinite(error) else math.inf

    def _work(self, kind: str, gap: tuple[int, int]) -> float:
        """Steps of the whole UNet for all pictures that the measurement of a gap is worth."""
        inside = gap[1] - gap[0] - 1
        steps = self.space.steps - max(0, gap[0] - 1) - inside * (1 - self._step_cost(kind, self._templates()[0]))
        return self._share * steps

    def _step_cost(self, kind: str, template: Point) -> float:
        """The cost of a step that inherits, or is skipped, as a share of a key step's."""
        if self.space.steps < 3 and kind == SKIP:
            return 0.0
        others = tuple(step for step in range(self.space.steps) if step != 1)
        point = self.space.normal(replace(template, keys=others, skips=(1,) if kind == SKIP else ()))
        return max(0.0, 1 - (1 - self.cost(point)) * self.space.steps)

    @property
    def _fewest(self) -> int:
        return max(2, math.ceil(self.space.steps / _LEAST_KEYS))

    def _templates(self) -> list[Point]:
        """Points without key steps, to begin with."""
        levels = [Point((), level=level, damping=damping) for level in self.space.levels for damping in (0.75, 0.0)]
        return levels or [Point(())]

    def _cost_with(self, template: Point, count: int) -> float:
        return self.cost(self._even(template, count))

    def _skipping(self, count: int) -> Point:
        """So many key steps, the last one of them; all others are skipped."""
        last = self.space.steps - 1
        return self.space.normal(Point((*uniform(last, count - 1), last), skips=tuple(range(last))))

    def _even(self, template: Point, count: int) -> Point:
        return self.space.normal(replace(template, keys=uniform(self.space.steps, count)))

    def _affordable(self, template: Point, budget: float) -> int:
        """The most key steps that a budget allows, 0 where it allows too few."""
        counts = range(self.space.steps - 1, self._fewest - 1, -1)
        return next((count for count in counts if self._cost_with(template, count) <= budget + _ROUNDING), 0)

    def _best_template(self, budget: float) -> Point:
        """The template with the least error where its key steps are spread evenly."""
        counts = {template: self._affordable(template, budget) for template in self._templates()}
        evens = [self._even(template, count) for template, count in counts.items() if count]
        cheapest = min(self._templates(), key=lambda template: self._cost_with(template, self._fewest))
        return replace(min(evens, key=self.rough_error, default=cheapest), keys=(), skips=())

    def _starts(self, budget: float, most: int) -> list[Point]:
        """The points with the least sums of errors, with gaps of each kind alone and with both, and regular ones."""
        estimate = self.estimate(budget)
        mixtures = dict.fromkeys(((*estimate.errors,), *((kind,) for kind in estimate.errors)))
        found = [each for kinds in mixtures for each in estimate.starts(self._template, budget, most, kinds)]
        points = dict.fromkeys(map(self.space.normal, [*found, *self._regular()]))
        within = [point for point in points if self.cost(point) <= budget + _ROUNDING]
        # Of plans with a key step in every so many, those that cost most.
        return [point for point in within if point in found or self.cost(point) > budget - _REGULAR]

    def _regular(self) -> Iterator[Point]:
        """Every so many steps a key step: errors of such plans cancel in part, which their sums do not know."""
        last = self.space.steps - 1
        for every in range(2, _LEAST_KEYS):
            keys = tuple(range(0, last + 1, every))
            yield replace(self._template, keys=keys)
            yield replace(self._template, keys=tuple(sorted({*keys, last})), skips=tuple(range(last)))

    def _neighbours(self, coordinate: Coordinate, estimate: Estimate, budget: float, point: Point) -> list[Point]:
        """Neighbours along a coordinate that are within the budget, those with the least sums of errors first."""
        near = [self._fitted(each, estimate, budget) for each in coordinate(self.space, point)]
        fitted = dict.fromkeys(each for each in near if each is not None)
        return sorted(fitted, key=estimate.of)[:_MOST_NEIGHBOURS]

    def _fitted(self, point: Point, estimate: Estimate, budget: float) -> Point | None:
        """A point with as many key steps as a budget allows, added and left out by sums of errors; None where none fits."""
        while self.cost(point) > budget + _ROUNDING:
            if len(point.keys) <= self._fewest:
                return None
            point = min(self.space.with_fewer_keys(point), key=estimate.of)
        while more := self._within(self.space.with_more_keys(point), budget):
            point = min(more, key=estimate.of)
        return point

    def _within(self, points: Iterator[Point], budget: float) -> list[Point]:
        return [point for point in points if len(point.keys) < self.space.steps and self.cost(point) <= budget + _ROUNDING]


def _alike(point: Point) -> object:
    """The part of a point that its cost depends on: without a switch, how many steps there are of each sort."""
    if point.switch:
        return point
    whole = len({*point.halves}.intersection(point.keys)), len({*point.halves}.difference(point.keys))
    return len(point.keys), len(point.skips), point.level, whole


def _named(point: Point) -> str:
    """A point as the state's names have it."""
    return json.dumps(asdict(point))
