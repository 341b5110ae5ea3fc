"""The two searches as algorithms, with nothing of plans in them: the best way through steps by gaps, and a local search."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import nsmallest
from typing import NamedTuple, TypeVar

__all__ = ["Gap", "Way", "best_ways", "climb"]

T = TypeVar("T")
_ROUNDING = 1e-9
_CLEARLY = 1.1
"""Rough errors are clearly apart by this factor; what is less may be the other way round."""


class Gap(NamedTuple):
    """The steps from a key step up to the next: the kind of those in between, the error from them, and the cost of all."""

    kind: str
    error: float
    cost: float


class Way(NamedTuple):
    """Key steps, each with the kind of the gap behind it, and the sums of errors and costs."""

    error: float
    cost: float
    gaps: tuple[tuple[int, str], ...]


def best_ways(gaps: Mapping[tuple[int, int], Sequence[Gap]], steps: int, budget: float, most: int = 1) -> list[Way]:
    """Up to ``most`` ways from step 0 to the end with the least errors in sum, of those whose costs are within a budget.

    Dynamic programming over the steps at which a gap ends, of error and cost together: exact, as far as errors add up.

    Args:
        gaps: by key step and next key step, of which the last is the number of steps.
        steps: of the schedule.
        budget: for the sum of costs.
        most: how many ways, the best first.
    """
    ways: dict[int, list[Way]] = {0: [Way(0.0, 0.0, ())]}
    for (key, following), kinds in sorted(gaps.items()):
        found = [
            Way(way.error + gap.error, way.cost + gap.cost, (*way.gaps, (key, gap.kind)))
            for way in ways.get(key, ())
            for gap in kinds
            if way.cost + gap.cost <= budget + _ROUNDING
        ]
        ways[following] = _undominated([*ways.get(following, ()), *found], most)
    return nsmallest(most, ways.get(steps, ()), key=lambda way: (way.error, way.cost, way.gaps))


def _undominated(ways: Iterable[Way], most: int) -> list[Way]:
    """The ways that are worse in error and cost than fewer than ``most`` others."""
    kept: list[Way] = []
    for way in sorted(ways):  # by error: whatever is kept before is better in that
        if sum(other.cost <= way.cost + _ROUNDING for other in kept) < most:
            kept.append(way)
    return kept


def climb(
    starts: Sequence[T],
    moves: Sequence[Callable[[T], Iterable[T]]],
    error: Callable[[T], float],
    rough: Callable[[T], float],
    tries: int,
) -> T:
    """The best point found from the best start, and while there are tries left, from the next ones.

    From each, go on to the first neighbour with a lower error, until none has one.

    Args:
        starts: where to begin; those with the least rough errors come first.
        moves: each gives neighbours of a point, the most promising first. One is kept to as long as it finds better points; then
            it is the next one's turn, and after the last the first one's again.
        error: of a point.
        rough: an estimate of the error that takes less time. A point whose estimate is clearly above that of the best one is
            passed over, and its error not asked for.
        tries: at most, beside the starts. No point is tried twice.
    """
    tried, most = set(starts), len(set(starts)) + tries
    found = []
    for start in sorted(starts, key=rough):
        found.append(_climb(start, moves, error, rough, tried, most))
        if len(tried) >= most:
            break
    return min(found, key=error)


def _climb(
    best: T,
    moves: Sequence[Callable[[T], Iterable[T]]],
    error: Callable[[T], float],
    rough: Callable[[T], float],
    tried: set[T],
    most: int,
) -> T:
    least, least_rough, fruitless, turn = error(best), rough(best), 0, 0
    while fruitless < len(moves):
        better = False
        for candidate in moves[turn](best):
            if candidate in tried:
                continue
            if len(tried) >= most:
                return best
            tried.add(candidate)
            if (roughly := rough(candidate)) <= _CLEARLY * least_rough and (value := error(candidate)) < least:
                best, least, least_rough, better = candidate, value, roughly, True
                break
        fruitless = 0 if better else fruitless + 1
        turn = turn if better else (turn + 1) % len(moves)
    return best
