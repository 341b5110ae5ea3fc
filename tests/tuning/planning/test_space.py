"""Points as plans: what they say, and how they differ from their neighbours."""

from __future__ import annotations

import pytest

from engines import Manifest
from runtime.plans.plan import Plan
from runtime.plans.schedule import Schedule
from tests.support.unets import manifest_of, small_unet
from tuning.planning.space import COORDINATES, Point, Space, uniform

STEPS = 10
TIMESTEPS = tuple(1000.0 - 100 * step for step in range(STEPS))
SPACE = Space(TIMESTEPS, ("deepcache", "block"), ("original", "assembled"), guided=True)


@pytest.fixture(scope="module")
def manifests() -> dict[str, Manifest]:
    """Of two UNets that take turns."""
    return {"original": manifest_of(small_unet("uneven")), "assembled": manifest_of(small_unet("no mid"))}


def test_a_point_is_a_plan_that_other_numbers_of_steps_can_run_too(manifests: dict[str, Manifest]) -> None:
    plan = SPACE.plan(Point((0, 4, 5, 9), skips=(2, 7), level="block", halves=(5,)))
    schedule = Schedule(plan, manifests, TIMESTEPS, guided=True)
    kinds = ["key", "inherit", "skip", "inherit", "key", "key, half", "inherit", "skip", "inherit", "key"]
    assert [step.kind for step in schedule.all_steps()] == kinds
    assert [rule.predict.damping for rule in plan.rules if rule.predict] == [0.75, 0.5]
    longer = Schedule(plan, manifests, range(20, 0, -1))
    assert [step.index for step in longer.all_steps() if step.kind == "key"] == [0, 8, 10, 18]
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_all_key_steps_are_full() -> None:
    assert SPACE.plan(Point(tuple(range(STEPS)))).rules == ()


@pytest.mark.parametrize("switch", [1, 4, STEPS - 1])
def test_the_smaller_unet_runs_so_many_steps(manifests: dict[str, Manifest], switch: int) -> None:
    schedule = Schedule(SPACE.plan(Point((0, 4), level="block", switch=switch)), manifests, TIMESTEPS)
    assert [schedule.unet(index) for index in range(STEPS)] == ["assembled"] * switch + ["original"] * (STEPS - switch)


def test_neighbours_differ_in_what_they_are_named_after() -> None:
    point = Point((0, 4, 7), skips=(2,), switch=2)
    changed = [("damping", "skip_damping"), ("keys", "skips"), ("level",), ("switch",), ("halves",)]
    for coordinate, names in zip(COORDINATES, changed, strict=True):
        found = [each for each in coordinate(SPACE, point) if each != point]
        assert found
        for each in found:
            assert {name for name in vars(point) if getattr(each, name) != getattr(point, name)} <= set(names)
            assert each.keys[0] == 0
            assert not {*each.keys} & {*each.skips}
            assert STEPS - 1 not in each.skips
    assert {len(each.keys) for each in SPACE.with_more_keys(point)} == {4}
    assert {each.keys for each in SPACE.with_fewer_keys(point)} == {(0, 7), (0, 4)}


def test_what_cannot_be_varied_is_not() -> None:
    space, point = Space(TIMESTEPS, ("deepcache",), ("original",)), Point((0, 5), skips=(2,))
    assert [list(coordinate(space, point)) for coordinate in COORDINATES[2:]] == [[], [], []]
    alone = Space(TIMESTEPS, (), ("original",))
    assert alone.normal(Point((0, 5))).keys == (0, 5, 9), "without units to inherit, all else is skipped"
    assert alone.inherits(alone.normal(Point((0, 5)))) == ()


@pytest.mark.parametrize("count", range(1, 21))
def test_even_key_steps_are_as_many_as_asked_for(count: int) -> None:
    keys = uniform(20, count)
    assert len(keys) == len(set(keys)) == count
    assert keys[0] == 0
    assert max(keys) < 20
