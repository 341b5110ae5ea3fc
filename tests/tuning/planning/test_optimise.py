"""Dynamic programming against every way through a made-up table, and the local search on made-up errors."""

from __future__ import annotations

import random
from itertools import combinations, pairwise, product

import pytest

from tuning.planning.optimise import Gap, Way, best_ways, climb

STEPS = 7
COSTS = {"inherit": 0.1, "skip": 0.0}


def made_up(seed: int, longest: int = 4) -> dict[tuple[int, int], list[Gap]]:
    """Every gap of two steps and more has two kinds, of which the cheaper one is mostly the worse."""
    generator = random.Random(seed)
    gaps = {(key, key + 1): [Gap("inherit", 0.0, 1.0)] for key in range(STEPS)}
    for key in range(STEPS):
        for after in range(key + 2, min(STEPS, key + longest) + 1):
            inside = after - key - 1
            gaps[key, after] = [Gap(kind, generator.random(), 1 + inside * cost) for kind, cost in COSTS.items()]
    return gaps


def every_way(gaps: dict[tuple[int, int], list[Gap]]) -> list[Way]:
    ways = []
    for count in range(STEPS):
        for rest in combinations(range(1, STEPS), count):
            pairs = list(pairwise([0, *rest, STEPS]))
            if all(pair in gaps for pair in pairs):
                for chosen in product(*(gaps[pair] for pair in pairs)):
                    kinds = tuple((key, gap.kind) for (key, _), gap in zip(pairs, chosen, strict=True))
                    ways.append(Way(sum(gap.error for gap in chosen), sum(gap.cost for gap in chosen), kinds))
    return ways


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [2.2, 3.0, 4.45, 7.0])
def test_the_best_ways_are_those_of_all(seed: int, budget: float) -> None:
    gaps = made_up(seed)
    possible = sorted(way for way in every_way(gaps) if way.cost <= budget + 1e-9)
    found = best_ways(gaps, STEPS, budget, most=3)
    assert [way.error for way in found] == pytest.approx([way.error for way in possible[:3]])
    assert found[0].gaps == possible[0].gaps
    assert all(way.cost <= budget + 1e-9 for way in found)


def test_where_gaps_are_too_long_there_is_no_way() -> None:
    assert best_ways(made_up(0), STEPS, 1.5) == []


def test_a_climb_ends_where_no_neighbour_is_better_or_the_tries_are_over() -> None:
    tried: list[int] = []

    def error(number: int) -> float:
        tried.append(number)
        return abs(number - 5)

    def up(number: int) -> list[int]:
        return [number + 1]

    def down(number: int) -> list[int]:
        return [number - 1]

    assert climb([0], [down, up], error, error, 100) == 5
    assert climb([9], [down, up], error, error, 100) == 5
    tried.clear()
    assert climb([0], [up], error, error, 3) == 3
    assert set(tried) == {0, 1, 2, 3}


def test_tries_that_are_left_go_on_from_other_starts() -> None:
    heights = [1, 9, 9, 9, 2, 0]
    assert climb([0, 4], [lambda at: [at + 1] if at < 5 else []], heights.__getitem__, heights.__getitem__, 1) == 0
    assert climb([0, 4], [lambda at: [at + 1] if at < 5 else []], heights.__getitem__, heights.__getitem__, 9) == 5


def test_what_is_clearly_worse_by_a_rough_error_is_not_measured() -> None:
    errors = {"start": 5.0, "worse": 4.0, "near": 3.0}
    rough = {"start": 5.0, "worse": 5.6, "near": 5.4}
    measured: list[str] = []

    def error(name: str) -> float:
        measured.append(name)
        return errors[name]

    assert climb(["start"], [lambda _: ["worse", "near"]], error, rough.__getitem__, 9) == "near"
    assert "worse" not in measured


def test_the_start_with_the_least_rough_error_comes_first() -> None:
    rough = {1: 2.0, 7: 1.0}
    assert climb([1, 7], [lambda at: [at + 1]], lambda at: -at, lambda at: rough.get(at, 0.0), 3) == 10
