"""Plans are data: their JSON, their presets, what their patterns match, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.graph.topology import topology
from runtime import Plan, PlanError, Rule, Schedule, UNetRange, find_plan
from runtime.errors import PartitionError
from runtime.plans.checks import check_runs
from runtime.plans.key_steps import Explicit, Front, Threshold, Uniform
from runtime.plans.plan import inherited_features, matching
from runtime.report.cost import relative_macs
from tests.support.unets import TOPOLOGIES, manifest_of, small_unet

GOLDEN = Path(__file__).with_name("plan.json")
PLAN = Plan(
    name="mine",
    unets=(UNetRange(unet="assembled", start=0, stop=0.4), UNetRange(unet="original", start=0.4, stop=1)),
    rules=(
        Rule(units=("up.-2", "up.2.layer.0.attention"), when=Explicit(steps=(0, 1, 5))),
        Rule(units=("*.resnet",), kind="residual", when=Front(every=3), start=0.5),
        Rule(units=("down.*.sampler",), when=Threshold(above=0.25)),
    ),
    carry=True,
)
TIMESTEPS = (900.0, 700.0, 500.0, 300.0)


def laid_out(plan: Plan, steps: int = 4) -> Schedule:
    """The plan over a small UNet."""
    return Schedule(plan, {"original": manifest_of(small_unet("uneven"))}, [900.0 - 10 * index for index in range(steps)])


def one_rule(*units: str, every: int = 2, name: str = "mine") -> Plan:
    return Plan(name=name, rules=(Rule(units=units, when=Uniform(every=every)),))


@pytest.fixture(scope="module")
def units() -> tuple[str, ...]:
    return tuple(unit.name for unit in topology(small_unet("uneven")))


def test_a_plan_is_written_byte_for_byte_as_before() -> None:
    """The format is ours and versioned: plans that people keep must stay readable."""
    assert PLAN.model_dump_json(indent=1) + "\n" == GOLDEN.read_text("utf-8")
    assert Plan.read(GOLDEN) == PLAN


@pytest.mark.parametrize(
    "name", ["full", "block:3", "deepcache:2", "unit:2", "encoder:faster", "adaptive:0.2", "switch:0.4+layer:3"]
)
def test_presets_expand_to_plans_that_can_be_kept(name: str, tmp_path: Path) -> None:
    plan = find_plan(name)
    path = tmp_path / "plan.json"
    path.write_text(plan.model_dump_json())
    assert find_plan(path) == find_plan(str(path)) == find_plan(plan) == plan


def features(plan: str, model: str) -> frozenset[str]:
    names = [unit.name for unit in topology(small_unet(model))]
    return frozenset().union(*inherited_features(find_plan(plan), names))


def test_what_presets_inherit(units: tuple[str, ...]) -> None:
    assert find_plan("full").rules == ()
    assert find_plan("adaptive:1.5").rules[0].when == Threshold(above=1.5)
    assert find_plan("block:4") == one_rule("up.-2", every=4, name="block:4")
    assert features("block:4", "uneven") == {name for name in units if name.startswith("up.1.")}
    assert features("deepcache:4", "uneven") == {name for name in units if name.startswith("up.2.layer.1.")}
    for preset in ("quadratic:4", "front:4", "back:4", "random:4"):
        assert features(preset, "uneven") == features("deepcache:4", "uneven")
    assert features("deepcache:2", "no mid") == {name for name in units if name.startswith("up.2.layer.0.")}
    assert features("unit:2", "uneven") == {name for name in units if name.endswith(".attention.branch")}
    assert features("encoder:faster", "uneven") == {name for name in units if name.split(".")[0] in {"stem", "down", "mid"}}
    assert find_plan("switch:0.3+block:2").unets == (
        UNetRange(unet="assembled", start=0, stop=0.3),
        UNetRange(unet="original", start=0.3, stop=1),
    )


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("stem", ["stem"]),
        ("up.-1.layer.-2", ["up.2.layer.1.resnet", "up.2.layer.1.attention"]),
        ("down.-3.sampler", ["down.0.sampler"]),
        ("down.1", ["down.1.layer.0.resnet", "down.1.layer.0.attention", "down.1.sampler"]),
        ("up.2.layer.0", ["up.2.layer.0.resnet", "up.2.layer.0.attention"]),
        ("up.2.layer.0.attention", ["up.2.layer.0.attention"]),
        ("up.*.sampler", ["up.0.sampler", "up.1.sampler"]),
        ("*.layer.1.resnet", ["down.0.layer.1.resnet", "down.2.layer.1.resnet", "mid.layer.1.resnet",
                              "up.0.layer.1.resnet", "up.1.layer.1.resnet", "up.2.layer.1.resnet"]),
        ("mid", ["mid.layer.0.resnet", "mid.layer.0.attention", "mid.layer.1.resnet"]),
    ],
)  # fmt: skip
def test_patterns_name_units_layers_and_blocks(pattern: str, expected: list[str], units: tuple[str, ...]) -> None:
    assert [name for name in matching(pattern, units) if not name.endswith(".branch")] == expected


@pytest.mark.parametrize("pattern", ["up.7", "UP.1", "up.-4", "up.2.layer", "text_encoder", "vae_decoder", "", "up_blocks.2"])
def test_a_pattern_that_names_no_unit(pattern: str, units: tuple[str, ...]) -> None:
    if pattern == "up.2.layer":  # a part of a name is an ancestor, if an odd one
        assert len(matching(pattern, units)) == 12
        return
    with pytest.raises(
        PlanError,
        match=r"plan mine, UNet original: rules\.0\.units names '.*', which this UNet does not have; its units: time, stem",
    ):
        laid_out(one_rule(pattern))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            "nope:2",
            r"unknown plan 'nope:2'; choose from: full, block:N, .*, several joined by '\+', or the path of a \.json file",
        ),
        ("", "unknown plan ''"),
        ("block:2+", "unknown plan ''"),
        ("full:3", "plan 'full:3': full takes nothing after it"),
        ("block", "plan 'block': block takes a number of steps, such as 3"),
        ("block:", "takes a number of steps"),
        ("block:0", "takes a number of steps"),
        ("block:-1", "takes a number of steps"),
        ("deepcache:1.5", "takes a number of steps"),
        ("front:0", "front takes a number of steps"),
        ("encoder:slower", "takes a number of steps"),
        ("switch:1.5", "takes a number between 0 and 1, such as 0.4"),
        ("adaptive:-1", "adaptive takes a relative change of 0 or more, such as 0.3"),
        ("adaptive:nan", "takes a relative change of 0 or more"),
        ("adaptive:much", "takes a relative change of 0 or more"),
        (None, "plan is a NoneType; give a preset such as 'block:3', the path of a .json file, or a Plan"),
        (3, "plan is a int; give"),
        ("switch:0.2+switch:0.4", "unets.2 covers 0 to 0.4, expected a range that starts at 1"),
        ("missing.json", r"plan file missing\.json cannot be read: No such file"),
    ],
)
def test_unknown_plans(plan: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        find_plan(plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version"),
        ({"name": None}, "name"),
        ({"name": "two\nlines"}, "name"),
        ({"unets": [{"unet": "", "start": 0}]}, r"unets\.0\.unet"),
        ({"unets": [{"unet": "two\nlines", "start": 0}]}, r"unets\.0\.unet"),
        ({"inherit": ["up.1"]}, "inherit"),
        ({"rules": [{"units": "up.1", "when": {"mode": "uniform", "every": 2}}]}, r"rules\.0\.units"),
        ({"rules": [{"units": ["up.1"], "kind": "both", "when": {"mode": "uniform", "every": 2}}]}, r"rules\.0\.kind"),
        ({"rules": [{"units": ["up.1"], "when": {"mode": "sometimes"}}]}, r"rules\.0\.when"),
        ({"rules": [{"units": ["up.1"], "when": {"mode": "uniform", "every": 0}}]}, r"rules\.0\.when\.uniform\.every"),
        (
            {"rules": [{"units": ["up.1"], "when": {"mode": "explicit", "steps": [0, "x"]}}]},
            r"rules\.0\.when\.explicit\.steps\.1",
        ),
        ({"rules": [{"units": ["up.1"], "when": {"mode": "threshold", "above": -1}}]}, r"rules\.0\.when\.threshold\.above"),
        ({"unets": [{"unet": "original", "start": -1, "stop": 1}]}, r"unets\.0\.start"),
    ],
)
def test_a_malformed_file_names_the_field(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(json.loads(GOLDEN.read_text()) | changes))
    with pytest.raises(PlanError, match=rf"plan\.json, {message}: "):
        Plan.read(path)


EVERY_2 = {"mode": "uniform", "every": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"inherit": ["up.1"]},
            "inherit: there is no such field; the fields here are version, name, unets, switch_by, rules, carry, guidance, found",
        ),
        (
            {"rules": [{"unit": ["up.1"], "units": ["up.1"], "when": EVERY_2}]},
            "rules.0.unit: there is no such field; the fields here are units, kind, when, start, stop, predict",
        ),
        (
            {"rules": [{"units": ["up.1"], "when": EVERY_2 | {"center": 0.3}}]},
            "rules.0.when.uniform.center: there is no such field; the fields here are mode, every",
        ),
        (
            {"rules": [{"units": ["up.1"]}]},
            "rules.0.when: it is missing; the fields here are units, kind, when, start, stop, predict",
        ),
        ({"rules": [{"units": "up.1", "when": EVERY_2}]}, 'rules.0.units: Input should be a valid tuple; got "up.1"'),
        (
            {"rules": [{"units": ["up.1"], "kind": "both", "when": EVERY_2}]},
            "rules.0.kind: Input should be 'output' or 'residual'; got \"both\"",
        ),
        ({"carry": list(range(99))}, f"carry: Input should be a valid boolean; got {str(list(range(99)))[:100]}..."),
    ],
)
def test_a_malformed_file_says_what_was_got_and_what_is_allowed(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(json.loads(GOLDEN.read_text()) | changes))
    with pytest.raises(PlanError) as refusal:
        Plan.read(path)
    assert str(refusal.value) == f"plan file {path}, {message}"


def test_a_plan_by_steps_says_so_in_its_file(tmp_path: Path) -> None:
    ranges = (UNetRange(unet="assembled", start=0, stop=8), UNetRange(unet="original", start=8))
    plan = Plan(name="steps", unets=ranges, switch_by="steps")
    path = tmp_path / "plan.json"
    path.write_text(plan.model_dump_json())
    assert json.loads(path.read_text())["switch_by"] == "steps"
    assert Plan.read(path) == plan
    assert "switch_by" not in PLAN.model_dump()


def test_counting_steps_of_no_unets_is_refused() -> None:
    with pytest.raises(PlanError, match="plan bare: switch_by 'steps' but no unets; list the UNets by range, or leave it out"):
        Plan(name="bare", switch_by="steps").checked()


def test_messages_number_the_rule() -> None:
    fine = Rule(units=("up.0",), when=Uniform(every=2))
    for second, message in (
        (Rule(units=("up.7",), when=Uniform(every=2)), "rules.1.units names 'up.7'"),
        (Rule(units=("up.1",), when=Explicit(steps=(1,))), "rules.1.when leaves out step 0"),
        (Rule(units=("up.1",), when=Explicit(steps=(0, 9))), "rules.1.when.steps names step 9"),
        (Rule(units=("up.0",), when=Uniform(every=3)), "rules.1 inherits nothing: rules before it inherit all that it names"),
    ):
        with pytest.raises(PlanError, match=message):
            laid_out(Plan(name="two", rules=(fine, second)))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is no JSON"), (b"\xff\xfe", "is no JSON"), (b"[]", "the file: "), (b"", "is no JSON"), (b"[" * 10**5, "is no JSON")],
)
def test_a_file_that_is_no_plan(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=message):
        Plan.read(path)


def test_the_first_step_never_inherits() -> None:
    plan = Plan(name="late", rules=(Rule(units=("up.1",), when=Explicit(steps=(1, 2))),))
    with pytest.raises(PlanError, match=r"plan late: rules\.0\.when leaves out step 0.*add 0"):
        laid_out(plan)


@pytest.mark.parametrize(("every", "keys"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])])
def test_uniform_key_steps(every: int, keys: list[int]) -> None:
    steps = laid_out(one_rule("up.1", every=every), 5).all_steps()
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert [step.index for step in steps if step.key] == keys
    assert all(bool(step.inherited) != step.key for step in steps)


def test_a_plan_that_inherits_inside_a_segment_is_refused() -> None:
    unet = small_unet("uneven")
    plan = one_rule("up.1.layer.0.attention", name="inner")
    with pytest.raises(
        PartitionError,
        match=r"plan inner inherits up\.1\.layer\.0\.attention, but this bundle computes it "
        r"and its reader up\.1\.layer\.1\.resnet\S* in one segment \(up\.1\)$",
    ) as refusal:
        check_runs(laid_out(plan))
    assert refusal.value.unet == "original"
    for fitting in (manifest_of(unet, "unit"), manifest_of(unet, "layer"), manifest_of(unet, "block", plans=[plan])):
        check_runs(Schedule(plan, {"original": fitting}, TIMESTEPS))


@pytest.mark.parametrize("model", list(TOPOLOGIES))
def test_costs_fall_as_more_is_inherited(model: str) -> None:
    manifest = manifest_of(small_unet(model))

    def cost(plan: str, steps: int = 12) -> float:
        return relative_macs(Schedule(find_plan(plan), {"original": manifest}, [900.0 - index for index in range(steps)]))

    assert cost("full") == 1.0
    assert 1.0 > cost("block:2") > cost("block:3") > cost("block:6")
    assert cost("block:3") >= cost("deepcache:3") > 1 / 3
    # An inherit step costs the same in every schedule: 6, 4 and 2 of 12 steps compute everything.
    inherit_step = 2 * cost("block:2") - 1
    assert cost("block:3") == pytest.approx((4 + 8 * inherit_step) / 12)
    assert cost("block:6") == pytest.approx((2 + 10 * inherit_step) / 12)
