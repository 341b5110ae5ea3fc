"""The space that is searched: a plan as coordinates, and the neighbours of each."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from engines.bundle.names import NOISE
from runtime.plans.key_steps import Explicit
from runtime.plans.plan import Plan, Rule, UNetRange
from runtime.plans.presets import find_plan
from runtime.plans.words import Guidance, Predict

__all__ = ["COORDINATES", "DAMPINGS", "LEVELS", "Coordinate", "Point", "Space", "uniform"]

LEVELS = ("deepcache", "block", "layer", "unit", "encoder")
"""Presets whose units are inherited; which of them a bundle can run is for its partition."""
DAMPINGS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of forecasts; 0 takes what the last key step left as it is."""


@dataclass(frozen=True)
class Point:
    """A plan as coordinates.

    Steps are of three sorts. ``keys`` compute all; ``skips`` do not run the UNet, and forecast the picture that it foresees with
    ``skip_damping``; at the others the units of ``level``, a preset, are inherited, forecast with ``damping``. At ``halves``
    guidance evaluates the prompt's half only. The first ``switch`` steps run the smaller UNet.
    """

    keys: tuple[int, ...]
    skips: tuple[int, ...] = ()
    level: str = LEVELS[0]
    damping: float = 0.75
    skip_damping: float = 0.5
    halves: tuple[int, ...] = ()
    switch: int = 0


@dataclass(frozen=True)
class Space:
    """The choices that a search has.

    Args:
        timesteps: of each model evaluation.
        levels: presets that the bundles can run.
        unets: names of the UNet whose pictures count, and of the smaller one to begin with, if there is one.
        train_steps: timesteps of the whole noise schedule.
        guided: whether guidance has halves that steps can do without.
    """

    timesteps: tuple[float, ...]
    levels: tuple[str, ...]
    unets: tuple[str, ...]
    train_steps: int = 1000
    guided: bool = False

    @property
    def steps(self) -> int:
        """Model evaluations."""
        return len(self.timesteps)

    def inherits(self, point: Point) -> tuple[int, ...]:
        """The steps at which a point's level is inherited."""
        return self._others({*point.keys, *point.skips})

    def plan(self, point: Point, name: str = "candidate") -> Plan:
        """The plan that has these coordinates; it can be laid out over other numbers of steps, too."""
        rules = []
        if self.inherits(point):
            forecasts = point.damping and len(point.keys) > 1  # from the last two key steps
            predict = Predict(damping=point.damping) if forecasts else None
            rule = find_plan(f"{point.level}:2").rules[0]
            rules.append(rule.model_copy(update={"when": self._at(point.keys), "predict": predict}))
        if point.skips:
            predict = Predict(damping=point.skip_damping, space="x0")
            rules.append(Rule(units=(NOISE,), when=self._at(self._others(point.skips)), predict=predict))
        guidance = Guidance(when=self._at(self._others(point.halves))) if point.halves else None
        return Plan(name=name, unets=self._ranges(point), rules=tuple(rules), guidance=guidance)

    def with_more_keys(self, point: Point) -> Iterator[Point]:
        """Points with one key step more."""
        for step in self._others(point.keys):
            yield self.normal(replace(point, keys=tuple(sorted({*point.keys, step}))))

    def with_fewer_keys(self, point: Point) -> Iterator[Point]:
        """Points with one key step less, which inherits or is skipped; step 0 stays."""
        for step in point.keys[1:]:
            keys = tuple(key for key in point.keys if key != step)
            yield from (self.normal(replace(point, keys=keys, skips=(*point.skips, *more))) for more in ((), (step,)))

    def normal(self, point: Point) -> Point:
        """A point as others with the same plan: a step is of one sort, and the last is never skipped."""
        if not self.levels:  # what is no key step can only be skipped
            point = replace(point, skips=tuple(range(self.steps)), keys=tuple(sorted({*point.keys, self.steps - 1})))
        skips = tuple(sorted({*point.skips}.difference(point.keys, {self.steps - 1})))
        return replace(point, skips=skips, halves=tuple(sorted({*point.halves}.difference(skips))))

    def _at(self, steps: Iterable[int]) -> Explicit:
        return Explicit(steps=tuple(sorted(steps)), of=self.steps)

    def _others(self, steps: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted(set(range(self.steps)).difference(steps)))

    def _ranges(self, point: Point) -> tuple[UNetRange, ...]:
        """The UNets of a point as shares of the noise schedule, which hold for other numbers of steps."""
        if not point.switch:
            return ()
        large, small = self.unets
        before, after = (1 - self.timesteps[step] / self.train_steps for step in (point.switch - 1, point.switch))
        at = round((before + after) / 2, 6)
        return UNetRange(unet=small, start=0, stop=at), UNetRange(unet=large, start=at, stop=1)


Coordinate = Callable[[Space, Point], Iterator[Point]]


def uniform(steps: int, count: int) -> tuple[int, ...]:
    """So many key steps, as evenly spread as can be."""
    return tuple(number * steps // count for number in range(count))


def _other_dampings(space: Space, point: Point) -> Iterator[Point]:
    """Nearer ones first."""
    if space.inherits(point):
        near = sorted(DAMPINGS, key=lambda damping: abs(damping - point.damping))
        yield from (replace(point, damping=damping) for damping in near[1:])
    if point.skips:
        near = sorted(DAMPINGS, key=lambda damping: abs(damping - point.skip_damping))
        yield from (replace(point, skip_damping=damping) for damping in near[1:])


def _other_levels(space: Space, point: Point) -> Iterator[Point]:
    if space.inherits(point):
        yield from (replace(point, level=level) for level in space.levels if level != point.level)


def _other_switches(space: Space, point: Point) -> Iterator[Point]:
    """The switch a step or two earlier or later; where there is none yet, at a fifth of the steps and at two."""
    if len(space.unets) < 2:
        return
    near = [point.switch + by for by in (1, -1, 2, -2)] if point.switch else [space.steps // 5, 2 * space.steps // 5]
    yield from (replace(point, switch=switch) for switch in near if 0 <= switch < space.steps and switch != point.switch)


def _other_halves(space: Space, point: Point) -> Iterator[Point]:
    """Two key steps in a row with half of guidance, or one of such with both."""
    if space.guided:
        for pair in pairwise(point.keys[1:]):
            yield replace(point, halves=tuple(sorted({*point.halves, *pair})))
        yield from (replace(point, halves=tuple(each for each in point.halves if each != step)) for step in point.halves)


def _other_sorts(space: Space, point: Point) -> Iterator[Point]:
    """A key step elsewhere, or steps of another sort in a gap."""
    for fewer in space.with_fewer_keys(point):
        yield from (more for more in space.with_more_keys(fewer) if len({*more.keys} - {*point.keys}) == 1)
    for key, following in pairwise([*point.keys, space.steps]):
        between = set(range(key + 1, following))
        for skips in ({*point.skips} - between, {*point.skips} | between):
            yield space.normal(replace(point, skips=tuple(sorted(skips))))
    for step in set(range(space.steps)).difference(point.keys):
        yield space.normal(replace(point, skips=tuple(sorted({*point.skips} ^ {step}))))


COORDINATES: tuple[Coordinate, ...] = (
    _other_dampings,
    _other_sorts,
    _other_levels,
    _other_switches,
    _other_halves,
)
"""Each gives the neighbours of a point along one coordinate, some of which may cost more; a new word of the language of plans is
one more."""
