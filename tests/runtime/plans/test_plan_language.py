"""Every level, kind and mode of the language of plans against a reference that shares no code with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from engines import Manifest
from exporter.graph.partition import Granularity
from runtime import LoadedBundle, Plan, PlanError, Rule, Schedule, UNetRange
from runtime.execution.executor import StepRecord
from runtime.plans.key_steps import Back, Explicit, Front, Mode, Quadratic, Random, Threshold, Uniform
from tests.support.denoise import denoise, small_inputs
from tests.support.reference import reference_scheduler
from tests.support.reference_script import reference_script
from tests.support.unets import live_network, manifest_of, relative_error, shared_network, shared_unet, small_unet

TOLERANCE = 1e-4
"""Of the largest final latent: float32 sums in another order give 1e-6 a step; a wrong feature gives more than 1e-2."""
STEPS = 7

# Units by level and kind, and the modules they stand for, in diffusers' names: written down, not derived.
LEVELS: dict[str, dict[str, tuple[list[str], str, list[str]]]] = {
    "uneven": {
        "block by output": (["up.1"], "output", ["up_blocks.1.upsamplers.0"]),
        "layer by output": (["up.2.layer.0"], "output", ["up_blocks.2.attentions.0"]),
        "unit by output": (["down.0.layer.0.attention"], "output", ["down_blocks.0.attentions.0"]),
        "block by residual": (["mid"], "residual", ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]),
        "layer by residual": (["up.-1.layer.-3"], "residual", ["up_blocks.2.resnets.0", "up_blocks.2.attentions.0"]),
        "unit by residual": (["up.2.*.attention"], "residual", [f"up_blocks.2.attentions.{i}" for i in range(3)]),
    },
    "no mid": {
        "block by output": (["up.-2"], "output", ["up_blocks.1.upsamplers.0"]),
        "layer by output": (["up.-1.layer.-2"], "output", ["up_blocks.2.attentions.0"]),
        "unit by output": (["up.0.layer.0.resnet"], "output", ["up_blocks.0.resnets.0"]),
        "block by residual": (["down.2"], "residual", ["down_blocks.2.resnets.0"]),
        "layer by residual": (["down.1.layer.0"], "residual", ["down_blocks.1.resnets.0", "down_blocks.1.attentions.0"]),
        "unit by residual": (["*.resnet"], "residual", [
            *(f"down_blocks.{i}.resnets.0" for i in range(3)),
            *(f"up_blocks.{i}.resnets.{j}" for i in range(3) for j in range(2)),
        ]),
    },
}  # fmt: skip
# Key steps of 7, from the definitions in docs/plans.md.
MODES: dict[str, tuple[Mode, set[int]]] = {
    "uniform": (Uniform(every=2), {0, 2, 4, 6}),
    "quadratic": (Quadratic(every=3), {0, 2, 3}),
    "front": (Front(every=2), {0, 1, 2, 4}),
    "back": (Back(every=2), {0, 3, 5, 6}),
    "explicit": (Explicit(steps=(0, 1, 4)), {0, 1, 4}),
    "random": (Random(every=2, seed=1), {0, 1, 2, 5}),
}
THRESHOLD = Threshold(above=0.4)
EVERY_2 = Uniform(every=2)


def made_by(
    unets: Mapping[str, Any], manifests: Mapping[str, Manifest], plan: Plan, steps: int = STEPS, scheduler: str = "ddim"
) -> tuple[Tensor, list[StepRecord]]:
    """Final latents and records of a plan on live modules, without guidance."""
    return made_on({name: live_network(unets[name], manifests[name]) for name in unets}, plan, steps, scheduler)


def made_on(
    networks: Mapping[str, LoadedBundle], plan: Plan, steps: int = STEPS, scheduler: str = "ddim"
) -> tuple[Tensor, list[StepRecord]]:
    """The same on networks that are there already."""
    noise, (latents, text) = reference_scheduler(scheduler, steps), small_inputs()
    return denoise(networks, noise, latents * noise.init_noise_sigma, text, plan)


def expected(
    unets: Mapping[str, Any], script: Sequence[tuple[str, Mapping[str, str]]], scheduler: str = "ddim", steps: int = STEPS
) -> Tensor:
    latents, text = small_inputs()
    noise = reference_scheduler(scheduler, steps)
    return reference_script(unets, noise, latents * noise.init_noise_sigma, text, 1.0, script)


def cut_like(plan: Plan) -> Plan:
    """A plan of one rule for which a bundle is cut as for this one: of its mode, the cut has what a threshold compares."""
    (rule,) = plan.rules
    return plan if isinstance(rule.when, Threshold) else Plan(name="cut", rules=(rule.model_copy(update={"when": EVERY_2}),))


def check_against_reference(
    model: str, granularity: Granularity | None, plan: Plan, keys: set[int] | None, paths: Sequence[str], steps: int = STEPS
) -> None:
    """Latents and key steps are the reference's; without ``keys``, the reference decides by the change of its stem."""
    rule, unet = plan.rules[0], shared_unet(model)
    made, records = made_on({"one": shared_network(model, granularity, cut_like(plan))}, plan, steps)
    found = {record.index for record in records if record.kind == "key"}
    stems: list[Tensor] = []
    handle = unet.conv_in.register_forward_hook(lambda module, args, output: stems.append(output))
    reference = expected({"one": unet}, script_of(found, paths, rule.kind, steps), steps=steps)
    handle.remove()
    assert relative_error(made, reference) < TOLERANCE
    if isinstance(rule.when, Threshold):
        assert 1 < len(found) < steps
        keys = decided(stems, rule.when.above)
    assert found == keys
    whole = max(len(record.ran) for record in records)
    assert all(len(record.ran) < whole for record in records if record.kind == "inherit")


def decided(stems: Sequence[Tensor], above: float) -> set[int]:
    """The steps at which a stem has changed by more than ``above``, relative to that of the last such step."""
    last, keys = stems[0], {0}
    for index, stem in enumerate(stems[1:], start=1):
        if float(torch.linalg.vector_norm(stem - last) / torch.linalg.vector_norm(last)) > above:
            last, keys = stem, keys | {index}
    return keys


def script_of(keys: set[int], paths: Sequence[str], kind: str, steps: int = STEPS) -> list[tuple[str, dict[str, str]]]:
    return [("one", {} if index in keys else dict.fromkeys(paths, kind)) for index in range(steps)]


@pytest.mark.parametrize("mode", [*MODES, "threshold"])
@pytest.mark.parametrize("level", list(LEVELS["uneven"]))
@pytest.mark.parametrize("model", list(LEVELS))
def test_level_kind_and_mode(model: str, level: str, mode: str) -> None:
    units, kind, paths = LEVELS[model][level]
    when, keys = MODES.get(mode, (THRESHOLD, None))
    plan = Plan(name=f"{level}, {mode}", rules=(Rule(units=tuple(units), kind=kind, when=when),))
    check_against_reference(model, None, plan, keys, paths)


@pytest.mark.parametrize("granularity", ["block", "layer", "unit", None])
def test_granularity_makes_no_difference(granularity: Granularity | None) -> None:
    plan = Plan(name="p", rules=(Rule(units=("up.2.*.attention",), kind="residual", when=Uniform(every=3)),))
    unet = shared_unet("uneven")
    made, _ = made_by({"one": unet}, {"one": manifest_of(unet, granularity, [plan])}, plan)
    paths = [f"up_blocks.2.attentions.{i}" for i in range(3)]
    assert relative_error(made, expected({"one": unet}, script_of({0, 3, 6}, paths, "residual"))) < TOLERANCE


@pytest.mark.parametrize("scheduler", ["pndm", "dpm++", "euler", "heun"])
def test_steps_are_counted_whatever_the_scheduler(scheduler: str) -> None:
    plan = Plan(name="p", rules=(Rule(units=("up.-2",), when=Front(every=2)),))
    unet = shared_unet("uneven")
    made, records = made_by({"one": unet}, {"one": manifest_of(unet, "block", [plan])}, plan, 4, scheduler)
    count = len(reference_scheduler(scheduler, 4).timesteps)
    keys = {4: {0, 1}, 5: {0, 1, 2}, 7: {0, 1, 2, 4}}[count]
    assert {record.index for record in records if record.kind == "key"} == keys
    script = script_of(keys, ["up_blocks.1.upsamplers.0"], "output", count)
    assert relative_error(made, expected({"one": unet}, script, scheduler, 4)) < TOLERANCE


def test_rules_hold_at_once_and_in_parts_of_the_schedule() -> None:
    """At step 2 the second rule computes what the first one's inheritance makes unnecessary, because step 3 reads it."""
    first = Rule(units=("up.1",), when=Uniform(every=3))
    second = Rule(units=("mid.layer.0.attention",), kind="residual", when=Uniform(every=2))
    late = Rule(units=("up.2.layer.1.resnet",), kind="residual", when=Uniform(every=4), start=0.5)
    plan = Plan(name="three", rules=(first, second, late))
    unet = shared_unet("uneven")
    made, records = made_by({"one": unet}, {"one": manifest_of(unet, "block", [plan])}, plan)
    script = []
    for index in range(STEPS):
        inheriting = {} if index in {0, 3, 6} else {"up_blocks.1.upsamplers.0": "output"}
        inheriting |= {} if index % 2 == 0 else {"mid_block.attentions.0": "residual"}
        inheriting |= {"up_blocks.2.resnets.1": "residual"} if index in {5, 6} else {}
        script.append(("one", inheriting))
    assert relative_error(made, expected({"one": unet}, script)) < TOLERANCE
    assert "mid.part.2" not in records[1].ran


def test_a_feature_belongs_to_the_first_rule_that_names_it() -> None:
    plan = Plan(
        name="two",
        rules=(
            Rule(units=("up.1",), when=Uniform(every=2)),
            Rule(units=("*.attention",), kind="residual", when=Uniform(every=7)),
        ),
    )
    unet = shared_unet("uneven")
    made, _ = made_by({"one": unet}, {"one": manifest_of(unet, "block", [plan])}, plan)
    attentions = [
        "down_blocks.0.attentions.0",
        "down_blocks.0.attentions.1",
        "down_blocks.1.attentions.0",
        "mid_block.attentions.0",
    ]
    attentions += [f"up_blocks.2.attentions.{i}" for i in range(3)]
    script: list[tuple[str, dict[str, str]]] = []
    for index in range(STEPS):
        inheriting = dict.fromkeys(attentions, "residual") if index else {}
        script.append(("one", inheriting | ({"up_blocks.1.upsamplers.0": "output"} if index % 2 else {})))
    assert relative_error(made, expected({"one": unet}, script)) < TOLERANCE


@pytest.mark.parametrize("granularity", ["block", None])
def test_threshold_decides_by_the_change_of_its_feature(granularity: Granularity | None) -> None:
    """Over more steps than in the matrix above."""
    plan = Plan(name="adaptive", rules=(Rule(units=("up.-2",), when=Threshold(above=0.25)),))
    check_against_reference("uneven", granularity, plan, None, ["up_blocks.1.upsamplers.0"], 20)


def pair() -> tuple[dict[str, Any], dict[str, Manifest]]:
    """Two UNets that take turns; the first has fewer layers."""
    unets = {"small": shared_unet("no mid"), "large": shared_unet("uneven")}
    return unets, {}


SWITCH = (UNetRange(unet="small", start=0, stop=0.5), UNetRange(unet="large", start=0.5, stop=1))


# Rules for units that both UNets have, their key steps of 7, and the modules that inherit.
CARRIED: dict[str, tuple[Rule, set[int], list[str]]] = {
    "by output, explicit": (
        Rule(units=("up.1",), when=Explicit(steps=(0, 2))), {0, 2}, ["up_blocks.1.upsamplers.0"],
    ),
    "by output, uniform": (
        Rule(units=("up.1",), when=Uniform(every=3)), {0, 3, 6}, ["up_blocks.1.upsamplers.0"],
    ),
    "by residual, explicit": (
        Rule(units=("up.0.layer.0.resnet",), kind="residual", when=Explicit(steps=(0, 2))), {0, 2}, ["up_blocks.0.resnets.0"],
    ),
    "by residual, uniform": (
        Rule(units=("down.*.layer.0",), kind="residual", when=Uniform(every=3)),
        {0, 3, 6},
        [
            *(f"down_blocks.{i}.resnets.0" for i in range(3)),
            *(f"down_blocks.{i}.attentions.0" for i in range(2)),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("name", list(CARRIED))
def test_switching_unets(name: str, carry: bool) -> None:
    """Without carry the switch (step 4 of 7: the first at half the noise) is a key step; with it, inheritance goes on across."""
    rule, keys, paths = CARRIED[name]
    plan = Plan(name="switch", unets=SWITCH, rules=(rule,), carry=carry)
    unets, manifests = pair()
    manifests |= {name: manifest_of(unet, "block", [plan]) for name, unet in unets.items()}
    made, records = made_by(unets, manifests, plan)
    names = [record.unet for record in records]
    assert names == ["small"] * names.count("small") + ["large"] * names.count("large")
    at = names.count("small")
    keys = keys | (set() if carry else {at})
    assert {record.index for record in records if record.kind == "key"} == keys
    script = [(unet, {} if i in keys else dict.fromkeys(paths, rule.kind)) for i, unet in enumerate(names)]
    assert relative_error(made, expected(unets, script)) < TOLERANCE


STEP_SWITCH = (UNetRange(unet="small", start=0, stop=3), UNetRange(unet="large", start=3))


@pytest.mark.parametrize("scheduler", ["ddim", "heun"])
@pytest.mark.parametrize("carry", [False, True])
def test_switching_unets_by_steps(carry: bool, scheduler: str) -> None:
    """The steps that run are counted, also where heun visits a timestep twice: steps 3 and 4 of it have one timestep."""
    rules = (Rule(units=("up.1",), when=Explicit(steps=(0, 4))),)
    plan = Plan(name="steps", unets=STEP_SWITCH, switch_by="steps", rules=rules, carry=carry)
    unets, manifests = pair()
    manifests |= {name: manifest_of(unet, "block", [plan]) for name, unet in unets.items()}
    made, records = made_by(unets, manifests, plan, 5, scheduler)
    count = {"ddim": 5, "heun": 9}[scheduler]
    names = ["small"] * 3 + ["large"] * (count - 3)
    if scheduler == "heun":
        assert records[3].timestep == records[4].timestep
        assert records[2].timestep != records[3].timestep
    assert [record.unet for record in records] == names
    keys = {0, 4} | (set() if carry else {3})
    script = [(name, {} if i in keys else {"up_blocks.1.upsamplers.0": "output"}) for i, name in enumerate(names)]
    assert relative_error(made, expected(unets, script, scheduler, 5)) < TOLERANCE


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_switch_by_steps_may_part_two_evaluations_of_one_timestep(at: int) -> None:
    plan = Plan(
        name="apart",
        unets=(UNetRange(unet="small", start=0, stop=at), UNetRange(unet="large", start=at, stop=9)),
        switch_by="steps",
    )
    unets, manifests = pair()
    manifests |= {name: manifest_of(unet) for name, unet in unets.items()}
    made, records = made_by(unets, manifests, plan, 5, "heun")
    names = ["small"] * at + ["large"] * (9 - at)
    assert [record.unet for record in records] == names
    assert relative_error(made, expected(unets, [(name, {}) for name in names], "heun", 5)) < TOLERANCE


def by_steps(*ends: tuple[float, float | None]) -> Plan:
    ranges = tuple(UNetRange(unet="one", start=start, stop=stop) for start, stop in ends)
    return Plan(name="p", switch_by="steps", unets=ranges)


def test_carry_of_features_that_do_not_match_is_refused() -> None:
    plan = Plan(name="c", unets=SWITCH, rules=(Rule(units=("mid", "up.0"), when=Explicit(steps=(0, 2))),), carry=True)
    unets, manifests = pair()
    only = Plan(name="c", rules=(Rule(units=("up.0",), when=Uniform(every=2)),))
    manifests |= {name: manifest_of(unet, "block", [only]) for name, unet in unets.items()}
    with pytest.raises(PlanError, match="UNet small: rules.0.units names 'mid', which this UNet does not have"):
        Schedule(plan, manifests, [900.0, 700.0, 400.0, 100.0])
    wider = small_unet("uneven", block_out_channels=(16, 24, 40))
    manifests["large"] = manifest_of(wider, "block", [only])
    plan = Plan(name="c", unets=SWITCH, rules=(Rule(units=("up.0",), when=Explicit(steps=(0,))),), carry=True)
    with pytest.raises(PlanError, match=r"carry cannot take up.0.sampler from UNet small to large: .*set carry to false"):
        Schedule(plan, manifests, [900.0, 700.0, 400.0, 100.0])


def test_carry_of_a_compared_feature_that_does_not_match_is_refused() -> None:
    when = Threshold(above=0.1, feature="up.0.sampler")
    plan = Plan(name="c", unets=SWITCH, rules=(Rule(units=("head",), when=when),), carry=True)
    wider = small_unet("uneven", block_out_channels=(16, 24, 40))
    manifests = {"small": manifest_of(small_unet("uneven")), "large": manifest_of(wider)}
    with pytest.raises(PlanError, match=r"carry cannot take up.0.sampler from UNet small to large: .*set carry to false"):
        Schedule(plan, manifests, [900.0, 700.0, 400.0, 100.0])
    Schedule(plan.model_copy(update={"carry": False}), manifests, [900.0, 700.0, 400.0, 100.0])


def test_what_is_computed_afresh_after_a_switch_need_not_match() -> None:
    wider = small_unet("uneven", block_out_channels=(16, 24, 40))
    manifests = {"small": manifest_of(small_unet("uneven")), "large": manifest_of(wider)}
    timesteps = [900.0, 700.0, 400.0, 100.0]  # the third is the switch
    for keys, fits in (((0, 2), True), ((0, 1), False)):
        plan = Plan(name="c", unets=SWITCH, rules=(Rule(units=("up.0",), when=Explicit(steps=keys)),), carry=True)
        if fits:
            Schedule(plan, manifests, timesteps)
        else:
            with pytest.raises(PlanError, match="set carry to false"):
                Schedule(plan, manifests, timesteps)


BAD_PLANS: dict[str, tuple[Plan, str]] = {
    "gap": (
        Plan(name="p", unets=(SWITCH[0], UNetRange(unet="large", start=0.6, stop=1))),
        "unets.1 covers 0.6 to 1, expected .* at 0.5",
    ),
    "overlap": (Plan(name="p", unets=(SWITCH[0], UNetRange(unet="large", start=0.4, stop=1))), "unets.1 covers 0.4 to 1"),
    "no share": (
        Plan(name="p", unets=(UNetRange(unet="one", start=0, stop=8), UNetRange(unet="one", start=8))),
        "unets.0 covers 0 to 8; start and stop are shares of the noise schedule, from 0 to 1; for steps set switch_by",
    ),
    "starts at the end": (
        Plan(name="p", unets=(UNetRange(unet="one", start=0, stop=1), UNetRange(unet="one", start=1))),
        "unets.1 covers 1 to the end; start and stop are shares",
    ),
    "open in between": (
        Plan(name="p", unets=(UNetRange(unet="one", start=0), UNetRange(unet="one", start=0.5))),
        "unets.0 covers 0 to the end, but is not the last; only the last range may leave stop out",
    ),
    "half a step": (by_steps((0, 1.5), (1.5, None)), "unets.0 covers 0 to 1.5; with switch_by 'steps' .* whole numbers of steps"),
    "gap of steps": (by_steps((0, 1), (2, None)), "unets.1 covers 2 to the end, expected a range that starts at 1"),
    "overlap of steps": (by_steps((0, 2), (1, 3)), "unets.1 covers 1 to 3, expected a range that starts at 2: .* or gap"),
    "stops beyond the steps": (by_steps((0, 2), (2, 4)), "unets.1 covers steps 2 to 4, but only 3 steps run; choose a start"),
    "starts beyond the steps": (by_steps((0, 3), (3, None)), "unets.1 covers steps 3 to the end, but only 3 steps run"),
    "leaves steps out": (by_steps((0, 2)), "unets end at step 2, but 3 steps run; leave the last stop out"),
    "end": (Plan(name="p", unets=(SWITCH[0],)), "unets end at 0.5; the last range must end at 1"),
    "first step": (Plan(name="p", rules=(Rule(units=("up.1",), when=Explicit(steps=(1, 2))),)), "rules.0.when leaves out step 0"),
    "too many steps": (
        Plan(name="p", rules=(Rule(units=("up.1",), when=Explicit(steps=(0, 9))),)),
        "rules.0.when.steps names step 9",
    ),
    "no such unit": (Plan(name="p", rules=(Rule(units=("up.7",), when=Uniform(every=2)),)), "rules.0.units names 'up.7'"),
    "no branch": (
        Plan(name="p", rules=(Rule(units=("up.1",), kind="residual", when=Uniform(every=2)),)),
        "up.1.sampler has no residual branch: its input and output differ and there is no shortcut",
    ),
    "ends before it starts": (
        Plan(name="p", rules=(Rule(units=("up.1",), when=Uniform(every=2), start=0.8, stop=0.2),)),
        "plan p: rules.0 starts at 0.8 and stops at 0.2; stop is a share of the steps above start",
    ),
    "no such UNet": (Plan(name="p", unets=(UNetRange(unet="x", start=0, stop=1),)), "runs the UNet 'x'; there is: one"),
    "no such feature": (
        Plan(name="p", rules=(Rule(units=("up.1",), when=Threshold(above=0.1, feature="x")),)),
        "rules.0.when.feature is 'x'",
    ),
}


@pytest.mark.parametrize("name", list(BAD_PLANS))
def test_bad_plans_are_refused_by_field(name: str) -> None:
    plan, message = BAD_PLANS[name]
    manifests = {"one": manifest_of(small_unet("uneven"))}
    with pytest.raises(PlanError, match=message):
        Schedule(plan.checked(), manifests, [900.0, 600.0, 300.0])


def test_a_rule_whose_part_of_the_schedule_has_no_step_changes_nothing() -> None:
    plan = Plan(name="late", rules=(Rule(units=("up.1",), when=Quadratic(every=2), start=0.9),))
    unet = shared_unet("uneven")
    made, records = made_by({"one": unet}, {"one": manifest_of(unet)}, plan, 2)
    assert {record.kind for record in records} == {"key"}
    assert relative_error(made, expected({"one": unet}, [("one", {}), ("one", {})], steps=2)) < TOLERANCE
