"""The two searches as algorithms, with nothing of plans in them: the best key steps for given gaps, and a local search."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from heapq import nsmallest
from itertools import pairwise
from typing import TypeVar

__all__ = ["Gaps", "best_keys", "climb", "estimate", "shifted"]

Gaps = Mapping[tuple[int, int], float]
"""The error where only the steps between two key steps inherit; the last gap ends at the number of steps."""

T = TypeVar("T")


def best_keys(gaps: Gaps, steps: int, count: int, most: int = 1) -> list[tuple[int, ...]]:
    """Up to ``most`` choices of ``count`` key steps, the first of them step 0, whose gaps have the least errors in sum.

    Dynamic programming over the steps at which a gap ends; exact, as far as errors of gaps add up.

    Args:
        gaps: errors by key step and next key step; a gap that is missing may not be chosen.
        steps: of the schedule.
        count: of key steps.
        most: how many choices, the best first.
    """
    starts: dict[int, list[tuple[float, tuple[int, ...]]]] = {0: [(0.0, ())]}
    for _ in range(count):
        ends: dict[int, list[tuple[float, tuple[int, ...]]]] = {}
        for (key, following), error in gaps.items():
            found = [(total + error, (*keys, key)) for total, keys in starts.get(key, ())]
            ends.setdefault(following, []).extend(found)
        starts = {following: nsmallest(most, found) for following, found in ends.items()}
    return [keys for _, keys in starts.get(steps, [])]


def estimate(gaps: Gaps, steps: int, keys: Iterable[int]) -> float:
    """The sum of the errors of the gaps between key steps; infinite where one is missing."""
    return sum(gaps.get(gap, float("inf")) for gap in pairwise([*sorted(keys), steps]))


def shifted(keys: tuple[int, ...], steps: int, errors: Gaps) -> Iterator[tuple[int, ...]]:
    """The key steps with one of them elsewhere, in the order of the sums of their gaps' errors; step 0 stays."""
    free = set(range(1, steps)).difference(keys)
    moved = [tuple(sorted({*keys, new} - {old})) for old in keys if old for new in free]
    yield from sorted(moved, key=lambda each: (estimate(errors, steps, each), each))


def climb(start: T, neighbours: Callable[[T], Iterable[T]], error: Callable[[T], float], tries: int) -> T:
    """Go on to the first neighbour with a lower error, until none has one or so many were tried.

    Args:
        start: where to begin.
        neighbours: of a point, the most promising first; what was tried before is passed over.
        error: of a point.
        tries: at most, beside that of ``start``.
    """
    best, least, tried = start, error(start), {start}
    while tries > 0:
        for candidate in neighbours(best):
            if candidate in tried:
                continue
            tried.add(candidate)
            tries -= 1
            value = error(candidate)
            if value < least:
                best, least = candidate, value
                break
            if tries <= 0:
                return best
        else:
            return best
    return best
