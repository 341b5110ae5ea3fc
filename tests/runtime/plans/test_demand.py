"""Demand, and the executor on it: properties over random graphs, cuts and plans, with exact arithmetic and no weights."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engines import Manifest, Unit
from runtime import Executor, Plan, PlanError, Rule, Schedule
from runtime.plans.checks import check_runs
from runtime.plans.demand import demand
from runtime.plans.key_steps import Uniform
from runtime.report.cost import relative_macs
from tests.support.unets import make_manifest
from tests.support.unit_graphs import (
    Case,
    arithmetic_network,
    cases,
    cut,
    inherited_at,
    inputs_of_step,
    predictions_unit_by_unit,
    switching_cases,
    units_of_a_graph,
)

# Graphs are tiny and each example takes a millisecond, but the cores may be shared: no deadline.
thorough = settings(max_examples=300, deadline=None)


def needed(units: Collection[Unit], wanted: Collection[str], given: Collection[str]) -> set[str]:
    """What must run, by recursion from the front: the definition, where ``demand`` is one walk backwards."""
    makers = {unit.name: unit for unit in units}
    running: set[str] = set()

    def need(feature: str) -> None:
        if feature not in given and feature in makers and feature not in running:
            running.add(feature)
            for name in makers[feature].inputs:
                need(name)

    for feature in wanted:
        need(feature)
    return running


@thorough
@given(units_of_a_graph(), st.data())
def test_demand_is_what_is_needed_and_no_more(units: tuple[Unit, ...], data: st.DataObject) -> None:
    names = [unit.name for unit in units]
    wanted = data.draw(st.sets(st.sampled_from(names)))
    given_features = data.draw(st.sets(st.sampled_from(names)))
    running = demand(units, wanted, given_features)
    assert {unit.name for unit in running} == needed(units, wanted, given_features)
    assert [unit.name for unit in running] == [name for name in names if name in {unit.name for unit in running}]


@thorough
@given(cases())
def test_segments_compute_what_unit_by_unit_inheritance_computes(case: Case) -> None:
    """Whatever the graph, the cut and the plan: if the bundle is said to run the plan, it runs it exactly."""
    schedule = case.schedule()
    try:
        check_runs(schedule)
    except PlanError:
        assume(False)
    log: list[str] = []
    executor = Executor({"original": arithmetic_network(case.manifest, log)}, schedule)
    predictions = []
    for index in range(case.steps):
        before = len(log)
        given_features = inputs_of_step(index)
        # A feature that was not computed yet would be a KeyError here.
        made, record = executor.step(index, given_features["sample"], given_features["timestep"], given_features["text_encoder"])
        predictions.append(int(made))
        assert tuple(log[before:]) == record.ran
        assert_nothing_runs_for_nobody(case, record.ran, record.inherited, schedule.resolve(index).wanted)
    assert predictions == predictions_unit_by_unit(case)


@thorough
@given(switching_cases())
def test_a_switch_computes_what_it_does_unit_by_unit(drawn: tuple[Case, Manifest]) -> None:
    """With and without carry. A feature that was not computed yet, or not by the UNet before, would be a KeyError."""
    case, other = drawn
    unets = {"original": case.manifest, "other": other}
    try:
        schedule = Schedule(case.plan.checked(), unets, [900.0 - index for index in range(case.steps)])
        check_runs(schedule)
    except PlanError:
        assume(False)
    executor = Executor({name: arithmetic_network(manifest, []) for name, manifest in unets.items()}, schedule)
    steps = [inputs_of_step(index) for index in range(case.steps)]
    made = [executor.step(index, step["sample"], step["timestep"], step["text_encoder"]) for index, step in enumerate(steps)]
    assert [int(prediction) for prediction, _ in made] == predictions_unit_by_unit(case, other)
    at = int(case.plan.unets[1].start)
    assert [record.unet for _, record in made] == ["original"] * at + ["other"] * (case.steps - at)


def assert_nothing_runs_for_nobody(case: Case, ran: tuple[str, ...], inherited: tuple[str, ...], wanted: frozenset[str]) -> None:
    segments = [segment for segment in case.manifest.segments if segment.name in ran]
    for position, segment in enumerate(segments):
        read_later = {name for later in segments[position + 1 :] for name in later.inputs} - set(inherited)
        assert (read_later | wanted) & set(segment.outputs), f"{segment.name} ran for nobody"
    assert set(inherited) <= {name for segment in segments for name in segment.inputs} | {"head"}


@thorough
@given(cases())
def test_a_cut_between_all_units_runs_every_plan(case: Case) -> None:
    units = case.manifest.units
    manifest = make_manifest(units=units, segments=cut(units, [[unit] for unit in units]))
    schedule = case.schedule(manifest)
    check_runs(schedule)
    executor = Executor({"original": arithmetic_network(manifest, [])}, schedule)
    steps = [inputs_of_step(index) for index in range(case.steps)]
    made = [
        int(executor.step(index, step["sample"], step["timestep"], step["text_encoder"])[0]) for index, step in enumerate(steps)
    ]
    assert made == predictions_unit_by_unit(case)


@thorough
@given(cases())
@pytest.mark.slow
def test_plans_are_refused_where_they_must_be_and_only_there(case: Case) -> None:
    """A plan is refused if and only if a unit that runs is in one segment with an inherited feature that it reads."""
    schedule = case.schedule()
    if any(clashes(case, index, schedule.resolve(index).wanted) for index in range(case.steps)):
        with pytest.raises(PlanError, match="in one segment"):
            check_runs(schedule)
    else:
        check_runs(schedule)


def clashes(case: Case, index: int, wanted: frozenset[str]) -> list[tuple[str, str]]:
    """Units that run at a step, and an inherited feature that each reads out of its own segment."""
    inherited = inherited_at(case, index)
    running = needed(case.manifest.units, wanted, inherited)
    homes = {unit: segment.name for segment in case.manifest.segments for unit in segment.units}
    return [
        (unit.name, name)
        for unit in case.manifest.units
        if unit.name in running
        for name in inherited.intersection(unit.inputs)
        if homes[unit.name] == homes[name]
    ]


@thorough
@given(cases())
def test_inherit_steps_never_cost_more_than_key_steps(case: Case) -> None:
    units = tuple(unit.model_copy(update={"macs": 10}) for unit in case.manifest.units)
    manifest = case.manifest.model_copy(update={"units": units})
    cost = relative_macs(case.schedule(manifest))
    keys = sum(not inherited_at(case, index) for index in range(case.steps))
    assert keys / case.steps - 1e-9 <= cost <= 1 + 1e-9  # rounding of one division


def test_only_what_is_inherited_stays_in_memory() -> None:
    units = (
        Unit(name="u0", kind="unit", inputs=("sample",)),
        Unit(name="u1", kind="unit", inputs=("u0",)),
        Unit(name="u2", kind="unit", inputs=("u1",)),
        Unit(name="head", kind="unit", inputs=("u2", "u0")),
    )
    manifest = make_manifest(units=units, segments=cut(units, [[unit] for unit in units]))
    network = arithmetic_network(manifest, [])
    executor = Executor({"original": network}, Case(manifest, plan_inheriting("u2"), 3).schedule())
    runners = {name: runner for name, runner in network.runners.items() if name != "s3"}
    executor.step(0, *map(torch.tensor, ([1], [2], [3])))
    # s2 makes u2, which is inherited; u0 and u1 are gone once the step is over.
    assert {name: len(runner.made) for name, runner in runners.items()} == {"s0": 0, "s1": 0, "s2": 1}  # type: ignore[attr-defined]
    executor.step(1, *map(torch.tensor, ([1], [2], [3])))
    assert {name: len(runner.made) for name, runner in runners.items()} == {"s0": 0, "s1": 0, "s2": 1}  # type: ignore[attr-defined]
    # The last step has read it: nobody will again.
    executor.step(2, *map(torch.tensor, ([1], [2], [3])))
    assert {name: len(runner.made) for name, runner in runners.items()} == {"s0": 0, "s1": 0, "s2": 0}  # type: ignore[attr-defined]


def plan_inheriting(*names: str) -> Plan:
    return Plan(name="test", rules=(Rule(units=names, when=Uniform(every=3)),))


def test_calls_that_take_turns_keep_their_own_features() -> None:
    units = (
        Unit(name="u0", kind="unit", inputs=("sample",)),
        Unit(name="head", kind="unit", inputs=("u0", "timestep")),
    )
    manifest = make_manifest(units=units, segments=cut(units, [[unit] for unit in units]))
    networks = {"original": arithmetic_network(manifest, [])}
    schedule = Case(manifest, plan_inheriting("u0"), 3).schedule()

    def run(executor: Executor, offset: int, index: int) -> int:
        made, _ = executor.step(index, torch.tensor([offset + index]), torch.tensor([index]), torch.tensor([0]))
        return int(made)

    alone = [[run(executor, offset, index) for index in range(3)] for offset, executor in
             ((100, Executor(networks, schedule)), (900, Executor(networks, schedule)))]  # fmt: skip
    first, second = Executor(networks, schedule), Executor(networks, schedule)
    in_turn = [(run(first, 100, index), run(second, 900, index)) for index in range(3)]
    assert [list(values) for values in zip(*in_turn, strict=True)] == alone
    assert alone[0] != alone[1]


@pytest.mark.parametrize("wanted", [["head"], ["u0"], []])
def test_what_is_given_is_never_computed(wanted: list[str]) -> None:
    units = (Unit(name="u0", kind="unit", inputs=("sample",)), Unit(name="head", kind="unit", inputs=("u0",)))
    assert demand(units, wanted, {"head", "u0"}) == []
