"""The space that is searched: a plan as coordinates, and the neighbours of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from runtime.plans.key_steps import Explicit
from runtime.plans.plan import Plan, Rule, UNetRange
from runtime.plans.presets import find_plan
from tuning.planning.optimise import Gaps, shifted

__all__ = ["LEVELS", "Point", "Space", "rule_of", "uniform"]

LEVELS = ("deepcache", "block", "layer", "unit", "encoder")
"""Presets whose units are inherited; which of them a bundle can run is for its partition."""
_MOST_SHIFTS = 24
"""Of key steps that are tried around a point: the most promising by the errors of their gaps."""


@dataclass(frozen=True)
class Point:
    """A plan as coordinates.

    ``level`` is a preset, whose units are inherited at all steps but ``keys``. The first ``switch`` steps run the smaller UNet.
    """

    keys: tuple[int, ...]
    level: str = LEVELS[0]
    switch: int = 0


@dataclass(frozen=True)
class Space:
    """What can be chosen.

    Args:
        timesteps: of each model evaluation.
        levels: presets that the bundles can run.
        gaps: errors of gaps, by which shifts of key steps are put in order.
        unets: names of the UNet whose pictures count, and of the smaller one to begin with, if there is one.
        train_steps: timesteps of the whole noise schedule.
    """

    timesteps: tuple[float, ...]
    levels: tuple[str, ...]
    unets: tuple[str, ...]
    train_steps: int = 1000

    @property
    def steps(self) -> int:
        """Model evaluations."""
        return len(self.timesteps)

    def plan(self, point: Point, name: str = "candidate") -> Plan:
        """The plan that has these coordinates; it can be laid out over other numbers of steps, too."""
        rules = () if len(point.keys) == self.steps else (rule_of(point.level, point.keys, self.steps),)
        return Plan(name=name, unets=self._ranges(point), rules=rules)

    def templates(self) -> list[Point]:
        """Points without key steps, to begin with."""
        return [Point((), level) for level in self.levels]

    def with_more_keys(self, point: Point) -> Iterator[Point]:
        """Points with one key step more."""
        others = [step for step in range(1, self.steps) if step not in point.keys]
        yield from (replace(point, keys=tuple(sorted({*point.keys, step}))) for step in others)

    def with_fewer_keys(self, point: Point) -> Iterator[Point]:
        """Points with one key step less; step 0 stays."""
        yield from (replace(point, keys=tuple(key for key in point.keys if key != step)) for step in point.keys if step)

    def neighbours(self, point: Point, gaps: Gaps) -> Iterator[Point]:
        """Points that differ in one coordinate, the most promising first as far as that is known; some may cost more."""
        for coordinate in _COORDINATES:
            yield from coordinate(self, point, gaps)

    def _ranges(self, point: Point) -> tuple[UNetRange, ...]:
        """The UNets of a point as shares of the noise schedule, which hold for other numbers of steps."""
        if not point.switch:
            return ()
        large, small = self.unets
        before, after = (1 - self.timesteps[step] / self.train_steps for step in (point.switch - 1, point.switch))
        at = round((before + after) / 2, 6)
        return UNetRange(unet=small, start=0, stop=at), UNetRange(unet=large, start=at, stop=1)


def uniform(steps: int, count: int) -> tuple[int, ...]:
    """So many key steps, as evenly spread as can be."""
    return tuple(sorted({round(number * steps / count) for number in range(count)}))


def rule_of(level: str, keys: tuple[int, ...], steps: int) -> Rule:
    """The rule of a preset with other key steps."""
    rule = find_plan(f"{level}:2").rules[0]
    return rule.model_copy(update={"when": Explicit(steps=keys, of=steps)})


def _other_levels(space: Space, point: Point, gaps: Gaps) -> Iterator[Point]:
    yield from (replace(point, level=level) for level in space.levels if level != point.level)


def _other_switches(space: Space, point: Point, gaps: Gaps) -> Iterator[Point]:
    """The switch a step or two earlier or later; where there is none yet, at a fifth of the steps and at two."""
    if len(space.unets) < 2:
        return
    near = [point.switch + by for by in (1, -1, 2, -2)] if point.switch else [space.steps // 5, 2 * space.steps // 5]
    yield from (replace(point, switch=switch) for switch in near if 0 <= switch < space.steps and switch != point.switch)


def _shifted_keys(space: Space, point: Point, gaps: Gaps) -> Iterator[Point]:
    for _, keys in zip(range(_MOST_SHIFTS), shifted(point.keys, space.steps, gaps), strict=False):
        yield replace(point, keys=keys)


_COORDINATES: tuple[Callable[[Space, Point, Gaps], Iterator[Point]], ...] = (
    _other_levels,
    _other_switches,
    _shifted_keys,
)
"""Each gives the neighbours of a point along one coordinate; a new word of the language of plans is one more."""
