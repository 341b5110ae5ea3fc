"""Plans that decide while they run: the steps of the definition, and no waiting for the device before the answer is needed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engines import Unit
from runtime import Executor, LoadedBundle, Plan, PlanError, Rule, Schedule, find_plan
from runtime.errors import PartitionError
from runtime.execution import executor as executor_module
from runtime.execution.deferred_comparison import DeferredComparison
from runtime.plans.checks import check_runs
from runtime.plans.key_steps import Explicit, Threshold, Uniform
from tests.support.unets import make_manifest, manifest_of, small_unet
from tests.support.unit_graphs import (
    Case,
    arithmetic_network,
    cases,
    cut,
    features_by_rule,
    inherited_at,
    inputs_of_step,
    value_of,
)

thorough = settings(max_examples=300, deadline=None)


def inputs_at(index: int) -> dict[str, Tensor]:
    """In float64, which has a norm and is exact for whole numbers of this size; the sample stays the same for two steps."""
    inputs = inputs_of_step(index)
    return {name: tensor.double() for name, tensor in (inputs | {"sample": inputs_of_step(index // 2)["sample"]}).items()}


@st.composite
def adaptive_cases(draw: st.DrawFn) -> tuple[Case, Rule]:
    """A case whose rules leave at least one unit to an adaptive rule."""
    case = draw(cases())
    taken = set().union(*features_by_rule(case.plan.rules, case.manifest.unet_units))
    free = [unit.name for unit in case.manifest.units if unit.name not in taken]
    outputs = [name for segment in case.manifest.segments for name in segment.outputs]
    assume(free and outputs)
    units = draw(st.lists(st.sampled_from(free), min_size=1, unique=True))
    when = Threshold(above=draw(st.sampled_from([0.0, 0.2, 1.0])), feature=draw(st.sampled_from(outputs)))
    start = draw(st.sampled_from([0.0, 0.5]))
    rule = Rule(units=tuple(units), when=when, start=start)
    return replace(case, plan=Plan(name="adaptive", rules=(*case.plan.rules, rule))), rule


def unit_by_unit(case: Case, inherited: set[str], cache: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    features = inputs_at(index)
    for unit in case.manifest.units:
        features[unit.name] = cache[unit.name] if unit.name in inherited else value_of(unit, features)
    return features


def expected(case: Case, rule: Rule) -> tuple[list[int], list[bool]]:
    """The definition, straight: predictions, and at which steps the adaptive rule computed afresh."""
    assert isinstance(rule.when, Threshold)
    cache: dict[str, Tensor] = {}
    last, keys, predictions = torch.zeros(1), [], []
    span, own = rule.span(case.steps), features_by_rule(case.plan.rules, case.manifest.unet_units)[-1]
    for index in range(case.steps):
        others = inherited_at(case, index)
        now = unit_by_unit(case, others, cache, index)[rule.when.feature]
        forced = index not in span or index == span.start or ("head" in own and index == case.steps - 1)
        key = forced or bool((now - last).norm() > rule.when.above * last.norm())
        last = now if key else last
        cache = unit_by_unit(case, others if key else others | own, cache, index)
        keys.append(key)
        predictions.append(int(cache["head"]))
    return predictions, keys


@thorough
@given(adaptive_cases())
@pytest.mark.slow
def test_steps_are_decided_and_computed_as_defined(drawn: tuple[Case, Rule]) -> None:
    case, rule = drawn
    try:
        schedule = case.schedule()
        check_runs(schedule)
    except PlanError:
        assume(False)
    log: list[str] = []
    executor = Executor({"original": arithmetic_network(case.manifest, log)}, schedule)
    predictions, keys = expected(case, rule)
    for index in range(case.steps):
        before, inputs = len(log), inputs_at(index)
        made, record = executor.step(index, inputs["sample"], inputs["timestep"], inputs["text_encoder"])
        assert int(made) == predictions[index]
        assert tuple(log[before:]) == record.ran
        step = schedule.resolve(index, keys[index])
        assert set(record.inherited) <= step.inherited


class Asked:
    """A change that notes when its answer is read."""

    def __init__(self, log: list[str], answer: bool) -> None:
        self._log, self._answer = log, answer

    def __bool__(self) -> bool:
        self._log.append("decided")
        return self._answer


@pytest.mark.parametrize(
    ("answer", "after"),
    [(False, ["up.2", "up.2.layer.2", "head"]), (True, ["down.0.sampler", "down.1", "down.2", "mid", "up.0", "up.1", "up.2"])],
)
def test_what_runs_either_way_is_started_before_the_answer_is_read(
    monkeypatch: pytest.MonkeyPatch, answer: bool, after: list[str]
) -> None:
    manifest = manifest_of(small_unet("uneven"))
    log: list[str] = []

    class Runner:
        def __init__(self, segment: Any) -> None:
            self._segment = segment

        def run(self, inputs: Any) -> dict[str, Tensor]:
            assert set(inputs) == set(self._segment.inputs)
            log.append(self._segment.name)
            return {name: torch.ones(1) for name in self._segment.outputs}

        def synchronize(self) -> None: ...

    monkeypatch.setattr(executor_module, "DeferredComparison", lambda before, now, above: Asked(log, answer))
    plan = Plan(name="a", rules=(Rule(units=("up.1",), when=Threshold(above=0.1)),))
    runners: Any = {segment.name: Runner(segment) for segment in manifest.segments}
    schedule = Schedule(plan, {"one": manifest}, [900.0, 600.0, 300.0])
    executor = Executor({"one": LoadedBundle(manifest, runners)}, schedule)
    executor.step(0, *torch.ones(3, 1))
    assert "decided" not in log  # a first step is a key step, whatever its features are
    log.clear()
    _, record = executor.step(1, *torch.ones(3, 1))
    at = log.index("decided")
    assert log[:at] == ["stem", "down.0"]
    assert log[at + 1 :][: len(after)] == after
    assert record.ran == (*log[:at], *log[at + 1 :])
    assert (record.kind, record.inherited) == (("key", ()) if answer else ("inherit", ("up.1.sampler",)))


def test_other_rules_hold_for_the_feature_that_decides() -> None:
    """The feature is what this step has: computed from what another rule inherits."""
    units = (
        Unit(name="a", kind="unit", inputs=("sample",)),
        Unit(name="b", kind="unit", inputs=("a",)),
        Unit(name="c", kind="unit", inputs=("b",)),
        Unit(name="head", kind="unit", inputs=("c", "b", "timestep")),
    )
    manifest = make_manifest(units=units, segments=cut(units, [[unit] for unit in units]))
    rules = (
        Rule(units=("a",), when=Explicit(steps=(0, 2))),
        Rule(units=("c",), when=Threshold(above=0.0, feature="b")),
    )
    schedule = Schedule(Plan(name="two", rules=rules), {"original": manifest}, [900.0, 600.0, 300.0, 0.0])
    check_runs(schedule)
    log: list[str] = []
    executor = Executor({"original": arithmetic_network(manifest, log)}, schedule)
    records = []
    for index in range(4):
        sample = torch.tensor([17.0 + index], dtype=torch.float64)
        records.append(executor.step(index, sample, torch.ones(1).double(), torch.ones(1).double())[1])
    # b changes only where a is computed afresh.
    assert ["".join(record.ran) for record in records] == ["s0s1s2s3", "s1s3", "s0s1s2s3", "s1s3"]
    assert [record.inherited for record in records] == [(), ("a", "c"), (), ("a", "c")]


@pytest.mark.parametrize("feature", ["up.2.layer.0.attention", "head"])
def test_a_feature_that_is_made_from_what_the_rule_inherits_is_refused(feature: str) -> None:
    manifest = manifest_of(small_unet("uneven"), "unit")
    plan = Plan(name="late", rules=(Rule(units=("up.1",), when=Threshold(above=0.1, feature=feature)),))
    with pytest.raises(PlanError, match=rf"plan late: rules.0.when.feature is '{feature}', which is made from up.1.sampler, and"):
        Schedule(plan, {"one": manifest}, [900.0, 600.0])


def test_a_feature_that_is_made_from_what_the_rule_inherits_is_refused_though_it_inherits_the_feature_too() -> None:
    manifest = manifest_of(small_unet("uneven"), "unit")
    when = Threshold(above=0.1, feature="down.1.layer.0.attention")
    plan = Plan(name="late", rules=(Rule(units=("down.1", "down.0.layer.0"), when=when),))
    with pytest.raises(PlanError, match=r"rules.0.when.feature is 'down.1.layer.0.attention', which is made from "):
        Schedule(plan, {"one": manifest}, [900.0, 600.0])


@pytest.mark.parametrize("name", ["encoder:3+adaptive:0.2", "adaptive:0.2+encoder:3"])
def test_a_feature_that_another_rule_inherits_is_refused(name: str) -> None:
    manifest, plan = manifest_of(small_unet("uneven"), "unit"), find_plan(name)
    with pytest.raises(PlanError, match=r"rules.\d.when.feature is 'stem', which rules.\d inherits at steps 0 to 3, where it"):
        Schedule(plan, {"one": manifest}, [900.0, 600.0, 300.0, 0.0])
    first, second = plan.rules
    apart = Plan(name="p", rules=(first.model_copy(update={"stop": 0.5}), second.model_copy(update={"start": 0.5})))
    schedule = Schedule(apart, {"one": manifest}, [900.0, 600.0, 300.0, 0.0])
    assert schedule.pending_threshold(1 if "adaptive" in name.partition("+")[0] else 3) is not None


@pytest.mark.parametrize("feature", ["text_encoder", "vae_decoder", "vae_encoder", "up.1.nothing"])
def test_only_what_the_unet_makes_can_be_compared(feature: str) -> None:
    manifest = manifest_of(small_unet("uneven"))
    plan = Plan(name="odd", rules=(Rule(units=("up.1",), when=Threshold(above=0.1, feature=feature)),))
    with pytest.raises(
        PlanError, match=f"'{feature}', which no segment of UNet one gives out; choose from: time, stem, "
    ) as refusal:
        Schedule(plan, {"one": manifest}, [900.0, 600.0])
    assert "vae" not in str(refusal.value).partition("choose from")[2]


def test_a_feature_inside_a_segment_could_be_given_out_by_another_bundle() -> None:
    manifest = manifest_of(small_unet("uneven"))
    when = Threshold(above=0.1, feature="down.1.layer.0.resnet")
    plan = Plan(name="inside", rules=(Rule(units=("up.1",), when=when),))
    with pytest.raises(PartitionError, match=r"no segment of UNet one gives out; choose from: .*"):
        Schedule(plan, {"one": manifest}, [900.0, 600.0])
    Schedule(plan, {"one": manifest_of(small_unet("uneven"), "block", [plan])}, [900.0, 600.0])


def test_what_decides_is_not_made_in_one_segment_with_what_reads_the_rules_features() -> None:
    reads = {"a": ("sample",), "b": ("sample",), "c": ("a",), "d": ("b",), "head": ("c", "d")}
    units = [Unit(name=name, kind="unit", inputs=inputs) for name, inputs in reads.items()]
    plan = Plan(name="p", rules=(Rule(units=("a",), when=Threshold(above=0.1, feature="d")),))
    joined = make_manifest(units=tuple(units), segments=cut(units, [units[:2], units[2:4], units[4:]]))
    message = r"plan p compares d before it decides whether to inherit a, but in this bundle segment s1, .* computes c from a"
    with pytest.raises(PlanError, match=message):
        check_runs(Schedule(plan, {"one": joined}, [900.0, 600.0]))
    apart = make_manifest(units=tuple(units), segments=cut(units, [units[:2], units[2:3], units[3:4], units[4:]]))
    check_runs(Schedule(plan, {"one": apart}, [900.0, 600.0]))


def test_plans_without_adaptive_rules_ask_nothing() -> None:
    manifest = manifest_of(small_unet("two stages"))
    plan = Plan(name="u", rules=(Rule(units=("up.0",), when=Uniform(every=2)),))
    schedule = Schedule(plan, {"one": manifest}, [900.0, 600.0])
    assert [schedule.pending_threshold(index) for index in range(2)] == [None, None]
    assert schedule.subgraph(schedule.resolve(1)) is schedule.subgraph(schedule.resolve(1))


def change(now: float, above: float, device: str = "cpu") -> bool:
    before = torch.full((2, 3), 2.0, device=device)
    return bool(DeferredComparison(before, torch.full((2, 3), now, device=device), above))


@pytest.mark.parametrize(
    ("now", "above", "expected"), [(2.0, 0.0, False), (2.2, 0.2, False), (2.6, 0.2, True), (1.0, 0.49, True)]
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_change_is_relative_to_the_feature_before(device: str, now: float, above: float, expected: bool) -> None:
    assert change(now, above, device) is expected


def test_norms_of_half_precision_are_taken_in_single() -> None:
    """In half precision both would be infinite, and nothing exceeds that."""
    before = torch.full((4, 320, 64, 64), 100.0, dtype=torch.float16)
    assert before.norm().isinf()
    assert bool(DeferredComparison(before, before * 1.5, 0.4))
    assert not bool(DeferredComparison(before, before * 1.5, 0.6))


def test_differences_of_half_precision_are_taken_in_single() -> None:
    """60,000 less -60,000 is no number of half precision."""
    before = torch.tensor([-60000.0, 1.0], dtype=torch.float16)
    now = torch.tensor([60000.0, 1.0], dtype=torch.float16)
    assert (now - before).isinf().any()
    assert bool(DeferredComparison(before, now, 1.99))
    assert not bool(DeferredComparison(before, now, 2.01))
    assert not bool(DeferredComparison(now, before, 2.01))


@pytest.mark.gpu
def test_the_host_waits_for_the_answer_alone() -> None:
    """What was put in the stream behind the comparison goes on while the answer is read."""
    large = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    found = DeferredComparison(large, large * 2, 0.5)
    for _ in range(20):
        torch.mm(large, large)
    behind = torch.cuda.Event()
    behind.record()
    assert bool(found)
    assert not behind.query()
    torch.cuda.synchronize()
