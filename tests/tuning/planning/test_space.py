"""Points as plans: what they say, and how they differ from their neighbours."""

from __future__ import annotations

import pytest

from engines import Manifest
from runtime.plans.plan import Plan
from runtime.plans.schedule import Schedule
from tests.support.unets import manifest_of, small_unet
from tuning.planning.gaps import LONGEST, gaps_of
from tuning.planning.space import Point, Space, uniform

STEPS = 10
TIMESTEPS = tuple(1000.0 - 100 * step for step in range(STEPS))
SPACE = Space(TIMESTEPS, ("deepcache", "block"), ("original", "assembled"))
GAPS = {(key, following): float(following - key) for key in range(STEPS) for following in range(key + 1, STEPS + 1)}


@pytest.fixture(scope="module")
def manifests() -> dict[str, Manifest]:
    """Of two UNets that take turns."""
    return {"original": manifest_of(small_unet("uneven")), "assembled": manifest_of(small_unet("no mid"))}


def test_a_point_is_a_plan_that_other_numbers_of_steps_can_run_too(manifests: dict[str, Manifest]) -> None:
    manifest = manifests["original"]
    plan = SPACE.plan(Point((0, 4, 5), "block"))
    schedule = Schedule(plan, {"original": manifest}, TIMESTEPS)
    assert [step.index for step in schedule.all_steps() if step.key] == [0, 4, 5]
    assert [step.index for step in Schedule(plan, {"original": manifest}, range(20, 0, -1)).all_steps() if step.key] == [0, 8, 10]
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_all_key_steps_are_full() -> None:
    assert SPACE.plan(Point(tuple(range(STEPS)))).rules == ()


@pytest.mark.parametrize("switch", [1, 4, STEPS - 1])
def test_the_smaller_unet_runs_so_many_steps(manifests: dict[str, Manifest], switch: int) -> None:
    schedule = Schedule(SPACE.plan(Point((0, 4), "block", switch)), manifests, TIMESTEPS)
    assert [schedule.unet(index) for index in range(STEPS)] == ["assembled"] * switch + ["original"] * (STEPS - switch)


def test_neighbours_differ_in_one_coordinate() -> None:
    point = Point((0, 4, 7), "deepcache", 2)
    found = list(SPACE.neighbours(point, GAPS))
    assert len(found) == len(set(found))
    for each in found:
        assert sum(getattr(each, name) != getattr(point, name) for name in ("keys", "level", "switch")) == 1
        assert each.keys[0] == 0
        assert 0 <= each.switch < STEPS
    assert {each.level for each in found} == {"deepcache", "block"}
    assert {each.switch for each in found} == {0, 1, 2, 3, 4}
    assert {len(each.keys) for each in found} == {3}
    assert {len(each.keys) for each in SPACE.with_more_keys(point)} == {4}
    assert [each.keys for each in SPACE.with_fewer_keys(point)] == [(0, 7), (0, 4)]


def test_one_unet_has_no_switch() -> None:
    space = Space(TIMESTEPS, ("deepcache",), ("original",))
    assert {each.switch for each in space.neighbours(Point((0, 5)), GAPS)} == {0}


@pytest.mark.parametrize("count", range(1, 21))
def test_even_key_steps_are_as_many_as_asked_for(count: int) -> None:
    keys = uniform(20, count)
    assert len(keys) == len(set(keys)) == count
    assert keys[0] == 0
    assert max(keys) < 20


def test_gaps_are_those_in_which_some_step_inherits() -> None:
    gaps = list(gaps_of(8))
    assert len(gaps) == len(set(gaps))
    assert all(2 <= following - key <= LONGEST and 0 <= key < following <= 8 for key, following in gaps)
    assert (6, 8) in gaps
    assert (0, 7) not in gaps
