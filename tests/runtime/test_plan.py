"""Plans are data: their JSON, their presets, what their patterns match, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.topology import topology
from runtime import Explicit, Plan, PlanError, Uniform, find_plan
from runtime.cost import relative_macs
from runtime.plan import check_runs, matching
from tests.unets import TOPOLOGIES, manifest_of, small_unet

GOLDEN = Path(__file__).with_name("plan.json")
PLAN = Plan(name="mine", key_steps=Explicit(steps=(0, 1, 5)), inherit=("up.1", "up.2.layer.0.attention", "down.*.sampler"))


@pytest.fixture(scope="module")
def units() -> tuple[str, ...]:
    return tuple(unit.name for unit in topology(small_unet("uneven")))


def test_a_plan_is_written_byte_for_byte_as_before() -> None:
    """The format is ours and versioned: plans that people keep must stay readable."""
    assert PLAN.model_dump_json(indent=1) + "\n" == GOLDEN.read_text("utf-8")
    assert Plan.read(GOLDEN) == PLAN


@pytest.mark.parametrize("name", ["full", "block:3", "deepcache:2"])
def test_presets_expand_to_plans_that_can_be_kept(name: str, units: tuple[str, ...], tmp_path: Path) -> None:
    plan = find_plan(name, units)
    path = tmp_path / "plan.json"
    path.write_text(plan.model_dump_json())
    assert find_plan(path, units) == find_plan(str(path), units) == find_plan(plan, units) == plan


def test_what_presets_inherit(units: tuple[str, ...]) -> None:
    assert find_plan("full", units).inherit == ()
    assert find_plan("block:4", units) == Plan(name="block:4", key_steps=Uniform(every=4), inherit=("up.1",))
    assert find_plan("deepcache:4", units) == Plan(name="deepcache:4", key_steps=Uniform(every=4), inherit=("up.2.layer.1",))
    no_mid = [unit.name for unit in topology(small_unet("no mid"))]
    assert find_plan("deepcache:2", no_mid).inherit == ("up.2.layer.0",)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("stem", ["stem"]),
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
    assert matching(pattern, units) == expected


@pytest.mark.parametrize("pattern", ["up.7", "UP.1", "up.2.layer", "text_encoder", "vae_decoder", "", "up_blocks.2"])
def test_a_pattern_that_names_no_unit(pattern: str, units: tuple[str, ...]) -> None:
    if pattern == "up.2.layer":  # a part of a name is an ancestor, if an odd one
        assert len(matching(pattern, units)) == 6
        return
    with pytest.raises(PlanError, match=r"plan mine: inherit names '.*', which this UNet does not have; its units: time, stem"):
        Plan(name="mine", inherit=(pattern,)).schedule(4, units)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("nope:2", r"unknown plan 'nope:2'; choose from: full, block:N, deepcache:N, or the path of a \.json file"),
        ("", "unknown plan ''"),
        ("full:3", "takes no number"),
        ("block", "needs a number of steps, such as block:3"),
        ("block:", "needs a number of steps"),
        ("block:0", "needs a number of steps"),
        ("block:-1", "needs a number of steps"),
        ("deepcache:1.5", "needs a number of steps"),
        ("deepcache:three", "needs a number of steps"),
        ("missing.json", r"plan file missing\.json cannot be read: No such file"),
    ],
)
def test_unknown_plans(plan: str, message: str, units: tuple[str, ...]) -> None:
    with pytest.raises(PlanError, match=message):
        find_plan(plan, units)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version"),
        ({"name": None}, "name"),
        ({"inherit": "up.1"}, "inherit"),
        ({"inherits": ["up.1"]}, "inherits"),
        ({"key_steps": {"mode": "sometimes"}}, "key_steps"),
        ({"key_steps": {"mode": "uniform", "every": 0}}, r"key_steps\.uniform\.every"),
        ({"key_steps": {"mode": "explicit", "steps": [0, "x"]}}, r"key_steps\.explicit\.steps\.1"),
    ],
)
def test_a_malformed_file_names_the_field(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(json.loads(GOLDEN.read_text()) | changes))
    with pytest.raises(PlanError, match=rf"plan\.json, {message}: "):
        Plan.read(path)


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "is no JSON"), (b"\xff\xfe", "is no JSON"), (b"[]", "the file: "), (b"", "is no JSON")]
)
def test_a_file_that_is_no_plan(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=message):
        Plan.read(path)


def test_the_first_step_never_inherits(units: tuple[str, ...]) -> None:
    plan = Plan(name="late", key_steps=Explicit(steps=(1, 2)), inherit=("up.1",))
    with pytest.raises(PlanError, match=r"plan late: key_steps leaves out step 0.*add 0"):
        plan.schedule(4, units)


@pytest.mark.parametrize(("every", "keys"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])])
def test_uniform_key_steps(every: int, keys: list[int], units: tuple[str, ...]) -> None:
    schedule = Plan(name="p", key_steps=Uniform(every=every), inherit=("up.1",)).schedule(5, units)
    assert [step.index for step in schedule] == [0, 1, 2, 3, 4]
    assert [step.index for step in schedule if step.key] == keys
    assert all(bool(step.inherited) != step.key for step in schedule)


def test_a_plan_that_inherits_inside_a_segment_is_refused_with_the_command_to_rebuild() -> None:
    unet = small_unet("uneven")
    manifest = manifest_of(unet)
    plan = Plan(name="inner", key_steps=Uniform(every=2), inherit=("up.1.layer.0.attention",))
    schedule = plan.schedule(4, manifest.unet_units)
    with pytest.raises(
        PlanError,
        match=r"plan inner inherits up\.1\.layer\.0\.attention, but this bundle computes it and its reader "
        r"up\.1\.layer\.1\.resnet in one segment \(up\.1\); .*: python -m exporter build --variant original .*--plan ",
    ):
        check_runs(plan, schedule, manifest)
    for fitting in (manifest_of(unet, "unit"), manifest_of(unet, "layer"), manifest_of(unet, "block", plans=[plan])):
        check_runs(plan, schedule, fitting)


@pytest.mark.parametrize("model", list(TOPOLOGIES))
def test_costs_fall_as_more_is_inherited(model: str) -> None:
    unet = small_unet(model)
    manifest = manifest_of(unet)

    def cost(plan: str, steps: int = 12) -> float:
        return relative_macs(find_plan(plan, manifest.unet_units).schedule(steps, manifest.unet_units), manifest)

    assert cost("full") == 1.0
    assert 1.0 > cost("block:2") > cost("block:3") > cost("block:6")
    assert cost("block:3") >= cost("deepcache:3") > 1 / 3
    # An inherit step costs the same in every schedule: 6, 4 and 2 of 12 steps compute everything.
    inherit_step = 2 * cost("block:2") - 1
    assert cost("block:3") == pytest.approx((4 + 8 * inherit_step) / 12)
    assert cost("block:6") == pytest.approx((2 + 10 * inherit_step) / 12)
