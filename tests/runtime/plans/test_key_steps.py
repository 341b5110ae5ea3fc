"""Sampling modes: which steps are key steps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from runtime.plans.key_steps import Back, Explicit, Front, Quadratic, Random, Threshold, Uniform
from runtime.plans.presets import FASTER_DIFFUSION


def test_uniform_is_every_nth() -> None:
    assert Uniform(every=3).keys(10) == {0, 3, 6, 9}
    assert Uniform(every=1).keys(4) == {0, 1, 2, 3}
    assert Uniform(every=9).keys(4) == {0}


def test_front_is_dense_early_and_back_is_its_mirror() -> None:
    assert Front(every=4).keys(20) == {0, 1, 3, 7, 13}
    assert Back(every=4).keys(20) == {0, 7, 13, 17, 19}


def test_quadratic_with_power_1_is_uniform_and_is_dense_around_its_center() -> None:
    assert Quadratic(every=4, power=1, center=0.3).keys(20) == {0, 4, 8, 12, 16}
    keys = sorted(Quadratic(every=5, power=2, center=0.5).keys(50))
    gaps = [after - before for before, after in pairwise(keys)]
    middle = min(range(len(gaps)), key=lambda i: abs(keys[i] - 25))
    assert gaps[middle] == min(gaps)
    assert gaps[0] > gaps[middle]
    assert 50 - keys[-1] > gaps[middle]


def test_explicit_as_listed_or_scaled() -> None:
    assert Explicit(steps=(0, 2, 5)).keys(6) == {0, 2, 5}
    assert Explicit(steps=FASTER_DIFFUSION, of=50).keys(50) == set(FASTER_DIFFUSION)
    assert Explicit(steps=FASTER_DIFFUSION, of=50).keys(20) == {0, 1, 2, 4, 6, 10, 14}
    with pytest.raises(ValueError, match=r"steps names step 5, but only 5 steps run: choose from 0 to 4"):
        Explicit(steps=(0, 5)).keys(5)
    with pytest.raises(ValueError, match=r"steps names step 60, but they are listed for 50 \(of\): choose from 0 to 49"):
        Explicit(steps=(0, 60), of=50).keys(100)


def test_random_is_drawn_once_and_for_all_by_its_seed() -> None:
    assert Random(every=3, seed=4).keys(20) == Random(every=3, seed=4).keys(20)
    assert len({frozenset(Random(every=3, seed=seed).keys(20)) for seed in range(8)}) > 4


@pytest.mark.parametrize(
    ("mode", "field"), [(Uniform, {"every": 0}), (Threshold, {"above": -0.1}), (Front, {"every": 2, "power": 0.5})]
)
def test_values_out_of_range_are_refused(mode: Any, field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="greater than or equal to"):
        mode(**field)


@given(
    mode=st.one_of(
        st.builds(Uniform, every=st.integers(1, 12)),
        st.builds(Quadratic, every=st.integers(1, 12), center=st.floats(0, 1), power=st.floats(1, 4)),
        st.builds(Front, every=st.integers(1, 12), power=st.floats(1, 4)),
        st.builds(Back, every=st.integers(1, 12), power=st.floats(1, 4)),
        st.builds(Random, every=st.integers(1, 12), seed=st.integers(0, 99)),
    ),
    steps=st.integers(1, 120),
)
def test_keys_are_steps_start_at_0_and_are_no_more_than_one_in_n(mode: Any, steps: int) -> None:
    keys = mode.keys(steps)
    assert 0 in keys
    assert keys <= set(range(steps))
    assert len(keys) <= -(-steps // mode.every) + 1
