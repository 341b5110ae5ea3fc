"""What the errors of single gaps say of whole plans."""

from __future__ import annotations

import math

import pytest

from tuning.planning.estimate import INHERIT, LONGEST, SKIP, Estimate, gaps_of
from tuning.planning.space import Point

STEPS = 12


def estimate() -> Estimate:
    """Errors rise with the fourth power of a gap's steps, and ten times as fast where they are skipped."""
    errors = {
        kind: {gap: factor * (gap[1] - gap[0]) ** 4 for gap in gaps_of(STEPS, kind)}
        for kind, factor in ((INHERIT, 1), (SKIP, 10))
    }
    return Estimate(STEPS, errors, {INHERIT: 0.1, SKIP: 0.0})


def test_gaps_are_those_in_which_some_step_inherits() -> None:
    gaps = list(gaps_of(8, INHERIT))
    assert len(gaps) == len(set(gaps))
    assert all(2 <= following - key <= LONGEST and 0 <= key < following <= 8 for key, following in gaps)
    assert (6, 8) in gaps
    assert (6, 8) not in set(gaps_of(8, SKIP)), "the last step is never skipped"


def test_sums_of_errors() -> None:
    assert estimate().of(Point(tuple(range(STEPS)))) == 0
    assert estimate().of(Point((0, 2, *range(4, STEPS)))) == 2 * 16
    assert estimate().of(Point((0, 3, *range(4, STEPS)), skips=(1, 2))) == 810
    assert estimate().of(Point((0, 3, *range(4, STEPS)), skips=(1,))) == (81 + 810) / 2
    assert estimate().of(Point((0, *range(8, STEPS)))) == pytest.approx(8**4), "a longer gap is extrapolated"
    assert estimate().of(Point((0, 10), skips=(11,))) == math.inf


def test_starts_are_within_the_budget_and_of_the_kinds_asked_for() -> None:
    template = Point((), level="block")
    skipping = estimate().starts(template, 0.5, 3, (SKIP,))
    assert skipping[0].level == "block"
    assert [len(each.keys) for each in skipping] == [6, 6, 6]
    assert all({*each.keys, *each.skips} == set(range(STEPS)) for each in skipping)
    inheriting = estimate().starts(template, 0.5, 3, (INHERIT,))
    assert all(each.skips == () and len(each.keys) == 5 for each in inheriting)
    both = estimate().starts(template, 0.5, 1, (INHERIT, SKIP))
    assert estimate().of(both[0]) <= min(estimate().of(each) for each in (skipping[0], inheriting[0]))
