"""The errors of whole plans estimated from those of single gaps: where to begin a search, and what to try first."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from tuning.planning.optimise import Gap, best_ways
from tuning.planning.space import Point

__all__ = ["INHERIT", "LONGEST", "SKIP", "Estimate", "gaps_of"]

INHERIT, SKIP = "inherit", "skip"
"""The two kinds of gap: its steps inherit a level's units, or do not run the UNet."""
LONGEST = 6
"""Steps from a key step to the next, of gaps that are measured; errors of longer ones are extrapolated."""
_LONGEST_CHOSEN = 10

Errors = Mapping[tuple[int, int], float]
"""By key step and next key step; the last gap ends at the number of steps."""


def gaps_of(steps: int, kind: str) -> Iterator[tuple[int, int]]:
    """Key step and next key step of every gap that is measured. The last step is never skipped."""
    last = steps if kind == INHERIT else steps - 1
    for key in range(steps):
        yield from ((key, following) for following in range(key + 2, min(last, key + LONGEST) + 1))


@dataclass(frozen=True)
class Estimate:
    """Errors of gaps by kind, and what a step of each kind costs as a share of a key step."""

    steps: int
    errors: Mapping[str, Errors]
    costs: Mapping[str, float]

    def of(self, point: Point) -> float:
        """The sum of the errors of a point's gaps; gaps with steps of both kinds count by the shares of these."""
        return sum(self._gap(point, *gap) for gap in pairwise([*point.keys, self.steps]))

    def starts(self, template: Point, budget: float, most: int, kinds: Sequence[str]) -> list[Point]:
        """The points with the least sums at a cost of at most ``budget``, a share of ``full``; all else is the template's."""
        gaps = {
            (key, following): list(self._gaps(kinds, key, following))
            for key in range(self.steps)
            for following in range(key + 1, min(self.steps, key + _LONGEST_CHOSEN) + 1)
        }
        found = []
        for way in best_ways(gaps, self.steps, budget * self.steps, most):
            keys = tuple(key for key, _ in way.gaps)
            ends = [*keys[1:], self.steps]
            skips = (range(key + 1, end) for (key, kind), end in zip(way.gaps, ends, strict=True) if kind == SKIP)
            found.append(replace(template, keys=keys, skips=tuple(step for part in skips for step in part)))
        return found

    def _gaps(self, kinds: Sequence[str], key: int, following: int) -> Iterator[Gap]:
        inside = following - key - 1
        for kind in kinds if inside else kinds[:1]:
            if (error := self._error(kind, key, following)) < math.inf:
                yield Gap(kind, error, 1 + inside * self.costs.get(kind, 0.0))

    def _gap(self, point: Point, key: int, following: int) -> float:
        inside = following - key - 1
        if not inside:
            return 0.0
        skipped = sum(key < step < following for step in point.skips) / inside
        shares = {INHERIT: 1 - skipped, SKIP: skipped}
        return sum(share * self._error(kind, key, following) for kind, share in shares.items() if share)

    def _error(self, kind: str, key: int, following: int) -> float:
        """Measured, or extrapolated for a longer gap: the worse of what those that begin and end there say."""
        if following == key + 1:
            return 0.0
        errors, length = self.errors.get(kind, {}), following - key
        if length <= LONGEST:
            return errors.get((key, following), math.inf)
        shorter, longest = LONGEST - 1, LONGEST
        begin = (key, key + shorter), (key, key + longest)
        end = (following - shorter, following), (following - longest, following)
        return max(_extrapolated(errors.get(one, math.inf), errors.get(two, math.inf), length) for one, two in (begin, end))


def _extrapolated(one: float, two: float, length: int) -> float:
    """By the power of their length with which errors rise, from those of the two longest gaps that are measured."""
    if not 0 < one < math.inf or two == math.inf:
        return math.inf
    power = max(1.0, math.log(two / one) / math.log(LONGEST / (LONGEST - 1)))
    return float(two * (length / LONGEST) ** power)
