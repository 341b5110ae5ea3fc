"""Units grouped into segments: all of them, once, in an order that runs, cut where plans need it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engines import Segment, Unit
from exporter import partition, topology
from exporter.graph.partition import GRANULARITIES, Granularity
from runtime import Plan, PlanError, Rule, Schedule, find_plan
from runtime.plans.checks import check_runs
from runtime.plans.demand import demand
from runtime.plans.key_steps import Threshold, Uniform
from tests.support.unets import TOPOLOGIES, make_manifest, small_unet
from tests.support.unit_graphs import rules_for, units_of_a_graph

PRESETS = ("block:2", "deepcache:2")


def units_of(model: str) -> tuple[Unit, ...]:
    return topology(small_unet(model))


def plans() -> list[Plan]:
    return [find_plan(name) for name in PRESETS]


@pytest.mark.parametrize("model", list(TOPOLOGIES))
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("cut_for_plans", [False, True])
def test_segments_cover_all_units_once_and_run_in_order(model: str, granularity: Granularity, cut_for_plans: bool) -> None:
    units = units_of(model)
    segments = partition(units, granularity, plans() if cut_for_plans else ())
    assert [name for segment in segments for name in segment.units] == [unit.name for unit in units]
    assert len({segment.name for segment in segments}) == len(segments)
    there = {"sample", "timestep", "text_encoder"}
    for segment in segments:
        assert set(segment.inputs) <= there, segment.name
        assert len(set(segment.inputs)) == len(segment.inputs)
        there |= set(segment.outputs)
    assert "head" in segments[-1].outputs
    assert_outputs_are_what_others_read(units, segments)


def assert_outputs_are_what_others_read(units: Sequence[Unit], segments: Sequence[Segment]) -> None:
    for segment in segments:
        read_outside = {name for other in segments if other is not segment for name in other.inputs} | {"head"}
        assert set(segment.outputs) == read_outside.intersection(segment.units)
        inside = [unit for unit in units if unit.name in segment.units]
        assert set(segment.inputs) == {name for unit in inside for name in unit.inputs} - set(segment.units)


@pytest.mark.parametrize("model", list(TOPOLOGIES))
def test_granularity_is_the_largest_group(model: str) -> None:
    units = units_of(model)
    whole = [tuple(n for n in (f"{unit.name}.branch", unit.name) if n in {u.name for u in units}) for unit in units]
    expected = [names for unit, names in zip(units, whole, strict=True) if not unit.name.endswith(".branch")]
    assert [segment.units for segment in partition(units, "unit")] == expected
    for segment in partition(units, "layer"):
        layers = {".".join(name.split(".")[:4]) for name in segment.units} - {"time"}
        assert len(layers) == 1, segment.units
    blocks = [segment.name for segment in partition(units, "block")]
    assert blocks == list(dict.fromkeys(name for unit in units if (name := block_name(unit.name))))


def block_name(unit: str) -> str:
    parts = unit.split(".")
    return "stem" if unit == "time" else ".".join(parts[:2]) if parts[0] in {"down", "up"} else parts[0]


def test_cuts_for_the_presets() -> None:
    units = units_of("uneven")
    segments = {segment.name: segment for segment in partition(units, "block", plans())}
    # block:N runs down.0's layers for their skips, not its sampler; deepcache:N runs the last layer only.
    assert segments["down.0"].units[-1] == "down.0.layer.1.attention"
    assert segments["down.0.sampler"].units == ("down.0.sampler",)
    assert segments["up.2"].units[-1] == "up.2.layer.1.attention"
    assert segments["up.2.layer.2"].units[1::2] == ("up.2.layer.2.resnet", "up.2.layer.2.attention")
    assert set(segments) == {
        "stem",
        "down.0",
        "down.0.sampler",
        "down.1",
        "down.2",
        "mid",
        "up.0",
        "up.1",
        "up.2",
        "up.2.layer.2",
        "head",
    }


def many_rules(**spans: Callable[[int], float]) -> Plan:
    """A rule for each of twenty units, with key steps of its own."""
    names = [unit.name for unit in units_of("uneven") if not unit.name.endswith(".branch")][1:21]
    rules = [
        Rule(units=(name,), when=Uniform(every=number + 2), **{end: place(number) for end, place in spans.items()})
        for number, name in enumerate(names)
    ]
    return Plan(name="many", rules=tuple(rules))


def test_rules_for_other_parts_of_the_schedule_are_as_many_as_one_likes() -> None:
    """They never inherit at once, so that their subsets need not be gone through."""
    plan = many_rules(start=lambda number: number / 20, stop=lambda number: (number + 1) / 20)
    units = units_of("uneven")
    manifest = make_manifest(units=units, segments=partition(units, None, [plan]))
    check_runs(Schedule(plan, {"original": manifest}, [900.0 - index for index in range(100)]))


def test_rules_with_the_same_key_steps_count_as_one() -> None:
    units, plan = units_of("uneven"), many_rules()
    alike = plan.model_copy(update={"rules": tuple(rule.model_copy(update={"when": Uniform(every=2)}) for rule in plan.rules)})
    assert len({unit for rule in alike.rules for unit in rule.units}) == 20
    joined = Rule(units=tuple(rule.units[0] for rule in alike.rules), when=Uniform(every=2))
    assert partition(units, None, [alike]) == partition(units, None, [Plan(name="one", rules=(joined,))])


def test_too_many_rules_that_may_inherit_at_once_are_refused() -> None:
    with pytest.raises(PlanError, match=r"plan many: 20 rules with .* hold at 0 of .* can be partitioned for at most 12; give"):
        partition(units_of("uneven"), None, [many_rules()])


def test_a_feature_that_two_rules_name_is_cut_for_as_it_is_run() -> None:
    """It belongs to the first, so the second inherits the rest alone."""
    plan = Plan(
        name="overlapping",
        rules=(Rule(units=("up.1",), when=Uniform(every=2)), Rule(units=("up.0", "up.1"), when=Uniform(every=3))),
    )
    units = units_of("uneven")
    manifest = make_manifest(units=units, segments=partition(units, None, [plan]))
    check_runs(Schedule(plan, {"original": manifest}, [900.0 - index for index in range(12)]))


def test_a_cut_that_no_plan_asks_for_is_not_made() -> None:
    units = units_of("uneven")
    nothing = Plan(name="nothing")
    assert partition(units, "block", [nothing]) == partition(units, "block")
    assert len(partition(units, "block")) == 9


@pytest.mark.parametrize("model", list(TOPOLOGIES))
@pytest.mark.parametrize(
    "pattern", ["down.0", "down.1.layer.0.resnet", "up.0", "up.1.layer.0", "up.*.sampler", "time", "stem", "head"]
)
def test_segments_cut_for_a_plan_run_it_and_nothing_else(model: str, pattern: str) -> None:
    """In an inherit step the segments that run have exactly the units that the plan demands."""
    units = units_of(model)
    plan = Plan(name="own", rules=(Rule(units=(pattern,), when=Uniform(every=2)),))
    segments = partition(units, "block", [plan])
    manifest = make_manifest(units=units, segments=segments)
    schedule = Schedule(plan, {"original": manifest}, [900.0, 500.0])
    check_runs(schedule)
    inherited = schedule.resolve(1).inherited
    running = demand(segments, ["head"], inherited)
    assert [name for segment in running for name in segment.units] == [unit.name for unit in demand(units, ["head"], inherited)]


@settings(max_examples=400, deadline=None)
@given(st.data())
@pytest.mark.slow
def test_segments_cut_for_any_plan_run_it(data: st.DataObject) -> None:
    """However its rules meet: at a step where some inherit, others keep what is read at a later one."""
    units, steps = data.draw(units_of_a_graph()), data.draw(st.integers(1, 8))
    rules = data.draw(rules_for([unit.name for unit in units], steps))
    if data.draw(st.booleans()):
        when = Threshold(above=0.1, feature=data.draw(st.sampled_from([unit.name for unit in units])))
        rules = (*rules, Rule(units=(data.draw(st.sampled_from([unit.name for unit in units])),), when=when))
    plan = Plan(name="any", rules=rules)
    try:
        manifest = make_manifest(units=units, segments=partition(units, None, [plan]))
        schedule = Schedule(plan, {"original": manifest}, [900.0 - index for index in range(steps)])
    except PlanError:
        assume(False)
    check_runs(schedule)


JOINED = ("block:3", "layer:2", "unit:2", "deepcache:3", "encoder:3")


@pytest.mark.parametrize("granularity", [None, "block"])
def test_segments_cut_for_presets_in_any_order_run_them(granularity: Granularity | None) -> None:
    units = units_of("uneven")
    for names in permutations(JOINED, 3):
        plan = find_plan("+".join(names))
        manifest = make_manifest(units=units, segments=partition(units, granularity, [plan]))
        check_runs(Schedule(plan, {"original": manifest}, [900.0 - index for index in range(20)]))
