"""Dynamic programming against every choice of key steps, and the local search on made-up errors."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from tuning.planning.optimise import best_keys, climb, estimate, shifted

STEPS = 9


def made_up(seed: int, longest: int = 5) -> dict[tuple[int, int], float]:
    generator = random.Random(seed)
    gaps = {(key, key + 1): 0.0 for key in range(STEPS)}
    for key in range(STEPS):
        gaps |= {(key, after): generator.random() for after in range(key + 2, min(STEPS, key + longest) + 1)}
    return gaps


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_the_best_key_steps_are_those_of_all_choices(seed: int, count: int) -> None:
    gaps = made_up(seed)
    every = [(0, *rest) for rest in combinations(range(1, STEPS), count - 1)]
    possible = [keys for keys in every if estimate(gaps, STEPS, keys) < float("inf")]
    expected = sorted(possible, key=lambda keys: estimate(gaps, STEPS, keys))[:4]
    assert best_keys(gaps, STEPS, count, most=4) == expected


def test_where_gaps_are_too_long_there_is_no_choice() -> None:
    assert best_keys(made_up(0), STEPS, 1) == []
    assert best_keys(made_up(0), STEPS, STEPS + 1) == []


def test_shifts_move_one_key_step_the_most_promising_first() -> None:
    gaps = made_up(1)
    found = list(shifted((0, 3, 6), STEPS, gaps))
    assert len(found) == len(set(found)) == 2 * 6
    assert all(keys[0] == 0 and len(keys) == 3 and len({0, 3, 6} - set(keys)) == 1 for keys in found)
    sums = [estimate(gaps, STEPS, keys) for keys in found]
    assert sums == sorted(sums)


def test_a_climb_ends_where_no_neighbour_is_better_or_the_tries_are_over() -> None:
    tried: list[int] = []

    def error(number: int) -> float:
        tried.append(number)
        return abs(number - 5)

    def neighbours(number: int) -> tuple[int, int]:
        return number - 1, number + 1

    assert climb(0, neighbours, error, 100) == 5
    assert len(tried) == len(set(tried)), "nothing is tried twice"
    tried.clear()
    assert climb(0, neighbours, error, 3) == 2
    assert len(tried) == 4
