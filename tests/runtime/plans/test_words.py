"""Forecasts, steps that skip the UNet and halves of guidance, against a reference that shares no code with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime import LoadedBundle, Plan
from runtime import Rule as PlanRule
from runtime.errors import PlanError
from runtime.execution.executor import StepRecord
from runtime.plans.key_steps import Explicit, Threshold, Uniform
from runtime.plans.presets import find_plan
from runtime.plans.words import Found, Guidance, Predict
from tests.support.denoise import denoise
from tests.support.reference import reference_scheduler
from tests.support.reference_words import Halves, Rule, Skip, reference_words
from tests.support.unets import TEXT_WIDTH, TOKENS, relative_error, shared_network, shared_unet

TOLERANCE = 1e-4
"""Of the largest final latent: float32 sums in another order give 1e-6 a step; a wrong feature gives more than 1e-2."""
STEPS = 8
EVERY_2, EVERY_3 = {0, 2, 4, 6}, {0, 3, 6}
# The outermost layer but one by output; every attention by residual; a unit that is read by a skip connection.
LEVELS = {
    "output": (("up.-1.layer.-2",), "output", ["up_blocks.2.attentions.1"]),
    "residual": (("up.2.*.attention",), "residual", [f"up_blocks.2.attentions.{i}" for i in range(3)]),
    "stem": (("stem",), "output", ["conv_in"]),
}


@pytest.fixture(scope="module")
def unet() -> Any:
    return shared_unet("uneven")


def network() -> LoadedBundle:
    """Each unit in a segment of its own, which can run every plan."""
    return shared_network("uneven", "unit", "unit:2")


def inputs(guidance: float, images: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    rows = images * (2 if guidance > 1 else 1)
    return torch.randn(images, 4, 8, 16, generator=generator), torch.randn(rows, TOKENS, TEXT_WIDTH, generator=generator)


def made_by(
    plan: Plan, guidance: float, scheduler: str = "ddim", images: int = 2, loaded: LoadedBundle | None = None, **settings: Any
) -> tuple[Tensor, list[StepRecord]]:
    """Final latents and records of a plan on live modules."""
    noise, (latents, text) = reference_scheduler(scheduler, STEPS, **settings), inputs(guidance, images)
    return denoise({"one": loaded or network()}, noise, latents * noise.init_noise_sigma, text, plan, guidance)


def expected(
    unet: Any, guidance: float, scheduler: str = "ddim", images: int = 2, settings: dict[str, Any] | None = None, **words: Any
) -> Tensor:
    noise, (latents, text) = reference_scheduler(scheduler, STEPS, **(settings or {})), inputs(guidance, images)
    return reference_words(unet, noise, latents * noise.init_noise_sigma, text, guidance, **words)


@pytest.mark.parametrize("damping", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("level", list(LEVELS))
def test_features_are_forecast(unet: Any, level: str, damping: float) -> None:
    units, kind, paths = LEVELS[level]
    predict = Predict(damping=damping)
    plan = Plan(name="p", rules=(PlanRule(units=units, kind=kind, when=Uniform(every=3), predict=predict),))
    made, records = made_by(plan, 3.0)
    assert relative_error(made, expected(unet, 3.0, rules=[Rule(paths, EVERY_3, kind, damping)])) < TOLERANCE
    assert [record.kind for record in records[:4]] == ["key", "inherit", "inherit", "key"]
    if damping:
        reuse, _ = made_by(Plan(name="p", rules=(PlanRule(units=units, kind=kind, when=Uniform(every=3)),)), 3.0)
        assert relative_error(made, reuse) > 10 * TOLERANCE


def test_order_0_is_reuse(unet: Any) -> None:
    units, kind, _ = LEVELS["output"]
    plans = [
        Plan(name="p", rules=(PlanRule(units=units, kind=kind, when=Uniform(every=2), predict=predict),))
        for predict in (None, Predict(order=0))
    ]
    one, other = (made_by(plan, 1.0)[0] for plan in plans)
    assert torch.equal(one, other)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("space", ["raw", "eps", "x0"])
@pytest.mark.parametrize("damping", [None, 0.5])
def test_the_unet_is_skipped(unet: Any, space: str, damping: float | None, prediction_type: str) -> None:
    predict = Predict(order=0 if damping is None else 1, damping=damping or 0.0, space=space)
    plan = Plan(name="p", rules=(PlanRule(units=("head",), when=Uniform(every=3), predict=predict),))
    settings: dict[str, Any] = {"prediction_type": prediction_type}
    made, records = made_by(plan, 3.0, **settings)
    keys = {0, 3, 6, 7}
    assert relative_error(made, expected(unet, 3.0, settings=settings, skip=Skip(keys, space, damping))) < TOLERANCE
    assert [record.kind for record in records] == ["key" if index in keys else "skip" for index in range(STEPS)]
    assert all(not record.ran for record in records if record.kind == "skip")


@pytest.mark.parametrize("scheduler", ["pndm", "dpm++", "ddim", "euler", "heun"])
def test_schedulers_skip_alike(unet: Any, scheduler: str) -> None:
    count = len(reference_scheduler(scheduler, STEPS).timesteps)
    made, _ = made_by(find_plan("skip:2"), 3.0, scheduler)
    keys = {*range(0, count, 2), count - 1}
    assert relative_error(made, expected(unet, 3.0, scheduler, skip=Skip(keys, "x0", 0.5))) < TOLERANCE


@pytest.mark.parametrize("scale", [0.0, 0.9, 1.0])
@pytest.mark.parametrize(("images", "prediction_type"), [(1, "v_prediction"), (3, "epsilon")])
def test_guidance_evaluates_one_half(unet: Any, scale: float, images: int, prediction_type: str) -> None:
    plan = Plan(name="p", guidance=Guidance(when=Explicit(steps=(0, 3, 4)), scale=scale))
    settings: dict[str, Any] = {"prediction_type": prediction_type}
    made, records = made_by(plan, 3.0, images=images, **settings)
    reference = expected(unet, 3.0, images=images, settings=settings, halves=Halves({0, 3, 4}, scale))
    assert relative_error(made, reference) < TOLERANCE
    assert [record.kind for record in records][:4] == ["key", "key, half", "key, half", "key"]


def test_without_guidance_there_are_no_halves(unet: Any) -> None:
    plan = find_plan("guide:2")
    made, records = made_by(plan, 1.0)
    assert relative_error(made, expected(unet, 1.0)) < TOLERANCE
    assert {record.kind for record in records} == {"key"}


# What is joined, with the reference's words: key steps of halves, rules and skips fall together and apart.
JOINED: dict[str, tuple[Plan, dict[str, Any]]] = {
    "halves and reuse": (
        find_plan("deepcache:3+guide:2"),
        {"rules": [Rule(LEVELS["output"][2], EVERY_3)], "halves": Halves(EVERY_2)},
    ),
    "halves and a forecast": (
        find_plan("forecast:2+guide:3"),
        {"rules": [Rule(LEVELS["output"][2], EVERY_2, damping=0.75)], "halves": Halves(EVERY_3)},
    ),
    "halves and forecast time": (
        Plan(
            name="p",
            rules=(PlanRule(units=("time",), when=Uniform(every=2), predict=Predict(damping=1.0)),),
            guidance=Guidance(when=Uniform(every=2)),
        ),
        {"rules": [Rule(["time_embedding"], EVERY_2, damping=1.0)], "halves": Halves(EVERY_2)},
    ),
    "halves and skips": (find_plan("skip:2+guide:4"), {"skip": Skip({*EVERY_2, 7}, "x0", 0.5), "halves": Halves({0, 4})}),
    "skips at halves": (find_plan("guide:3+skip:2"), {"skip": Skip({*EVERY_2, 7}, "x0", 0.5), "halves": Halves(EVERY_3)}),
    "skips and reuse": (
        find_plan("skip:2+deepcache:3"),
        {"skip": Skip({*EVERY_2, 7}, "x0", 0.5), "rules": [Rule(LEVELS["output"][2], EVERY_3)]},
    ),
    "all": (
        find_plan("skip:2+forecast:3+unit:2+guide:4"),
        {
            "skip": Skip({*EVERY_2, 7}, "x0", 0.5),
            "rules": [
                Rule(LEVELS["output"][2], EVERY_3, damping=0.75),
                Rule(
                    [
                        "down_blocks.0.attentions.0",
                        "down_blocks.0.attentions.1",
                        "down_blocks.1.attentions.0",
                        "mid_block.attentions.0",
                        # Not up_blocks.2.attentions.1: a feature belongs to the first rule that names it.
                        *[f"up_blocks.{block}.attentions.{layer}" for block, layer in ((1, 0), (1, 1), (2, 0), (2, 2))],
                    ],
                    EVERY_2,
                    "residual",
                ),
            ],
            "halves": Halves({0, 4}),
        },
    ),
}


@pytest.mark.parametrize("name", list(JOINED))
def test_words_are_joined(unet: Any, name: str) -> None:
    """On a bundle that is partitioned for the plan and no other."""
    plan, words = JOINED[name]
    made, _ = made_by(plan, 3.0, loaded=shared_network("uneven", None, plan))
    assert relative_error(made, expected(unet, 3.0, **words)) < TOLERANCE


def decided(records: list[StepRecord]) -> set[int]:
    return {record.index for record in records if record.kind.startswith("key")}


@pytest.mark.parametrize("guidance", [None, Guidance(when=Uniform(every=3))])
@pytest.mark.parametrize("predict", [None, Predict(damping=0.5)])
def test_adaptive_rules_forecast_and_have_halves(unet: Any, predict: Predict | None, guidance: Guidance | None) -> None:
    """The key steps are those that were decided while running; features are the reference's for these."""
    rule = PlanRule(units=LEVELS["output"][0], when=Threshold(above=0.2), predict=predict)
    plan = Plan(name="p", rules=(rule,), guidance=guidance)
    made, records = made_by(plan, 3.0)
    keys = decided(records)
    assert 2 < len(keys) < STEPS
    words: dict[str, Any] = {"rules": [Rule(LEVELS["output"][2], keys, damping=predict.damping if predict else None)]}
    words |= {"halves": Halves(EVERY_3)} if guidance else {}
    assert relative_error(made, expected(unet, 3.0, **words)) < TOLERANCE


def test_an_adaptive_rule_skips_the_unet(unet: Any) -> None:
    rule = PlanRule(units=("head",), when=Threshold(above=0.2), predict=Predict(damping=0.5, space="x0"))
    made, records = made_by(Plan(name="p", rules=(rule,)), 3.0)
    keys = decided(records)
    assert {0, STEPS - 1} < keys < set(range(STEPS))
    assert all(record.ran for record in records if record.kind == "skip")  # what decides is computed
    assert relative_error(made, expected(unet, 3.0, skip=Skip(keys, "x0", 0.5))) < TOLERANCE


def test_rules_forecast_in_a_part_of_the_schedule(unet: Any) -> None:
    """A forecast takes nothing from before its rule's part, whose first two key steps must have been."""
    units, _, paths = LEVELS["output"]
    rule = PlanRule(units=units, when=Uniform(every=2), predict=Predict(damping=1.0), start=0.25)
    made, _ = made_by(Plan(name="p", rules=(rule,), guidance=Guidance(when=Explicit(steps=(0, 5)))), 3.0)
    keys = {0, 1, 2, 4, 6}
    reference = expected(unet, 3.0, rules=[Rule(paths, keys, damping=1.0)], halves=Halves({0, 2, 5}))
    assert relative_error(made, reference) > TOLERANCE  # step 3 would read steps 1 and 2
    late = expected(unet, 3.0, rules=[Rule(paths, keys, damping=1.0, start=2)], halves=Halves({0, 2, 5}))
    assert relative_error(made, late) < TOLERANCE


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "order": ({"rules": [{"units": ["up.2"], "when": {"mode": "uniform", "every": 2}, "predict": {"order": 2}}]}, "order"),
    "damping": ({"rules": [{"units": ["up.2"], "when": {"mode": "uniform", "every": 2}, "predict": {"damping": -1}}]}, "damping"),
    "space": (
        {"rules": [{"units": ["up.2"], "when": {"mode": "uniform", "every": 2}, "predict": {"space": "x0"}}]},
        "rules.0.predict.space is 'x0', which is for rules whose only unit is 'head'",
    ),
    "an order that one key step cannot serve": (
        {"rules": [{"units": ["up.2"], "when": {"mode": "explicit", "steps": [0, 0]}, "predict": {}}]},
        "rules.0.predict.order is 1, which forecasts from two key steps, and when lists one; list another, or leave predict out",
    ),
    "adaptive guidance": ({"guidance": {"when": {"mode": "threshold", "above": 0.1}}}, "guidance.when: "),
    "scale": ({"guidance": {"when": {"mode": "uniform", "every": 2}, "scale": -1}}, "guidance.scale"),
    "unknown word": (
        {"rules": [{"units": ["up.2"], "when": {"mode": "uniform", "every": 2}, "predict": {"power": 2}}]},
        "order, damping, space",
    ),
    "found": ({"found": {"scheduler": "ddim"}}, "found.steps: it is missing"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_words_are_one_line(name: str, tmp_path: Path) -> None:
    fields, said = WRONG[name]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"name": "p", **fields}))
    with pytest.raises(PlanError) as raised:
        find_plan(path)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_adaptive_rule_does_not_forecast_what_it_compares(unet: Any) -> None:
    """Whatever its units are called; units that are others by their place are forecast."""

    def plan(unit: str, feature: str) -> Plan:
        return Plan(name="p", rules=(PlanRule(units=(unit,), when=Threshold(above=0.2, feature=feature), predict=Predict()),))

    for unit, feature in (("stem", "stem"), ("st*", "stem"), ("down.-3", "down.0.layer.1.resnet")):
        with pytest.raises(PlanError, match=f"rules.0.predict: the rule compares '{feature}' to decide its key steps"):
            made_by(plan(unit, feature).checked(), 1.0)
    # The last of three blocks; counted among the compared feature alone, it would be the first.
    _, records = made_by(plan("down.-1", "down.0.layer.1.resnet").checked(), 1.0)
    assert len(records) == STEPS


def test_the_first_and_last_steps_are_not_skipped(unet: Any) -> None:
    def plan(*steps: int, of: int | None = None) -> Plan:
        return Plan(name="p", rules=(PlanRule(units=("head",), when=Explicit(steps=steps, of=of)),))

    with pytest.raises(PlanError, match="rules.0.when leaves out step 7, so the last step would skip the UNet; .* add 7"):
        made_by(plan(0, 4), 1.0)
    with pytest.raises(PlanError, match="leaves out step 0"):
        made_by(plan(4, 7), 1.0)
    _, records = made_by(plan(0, 2, of=4), 1.0)
    assert decided(records) == {0, 4, 7}


def test_guide_stands_once_in_a_joined_plan() -> None:
    with pytest.raises(PlanError, match="guide stands there 2 times; a plan can have it once"):
        find_plan("guide:2+guide:3")


def test_a_plan_with_words_is_written_and_read_again(tmp_path: Path) -> None:
    plan = find_plan("skip:2+forecast:3+guide:4").model_copy(
        update={"found": Found(scheduler="dpm++", steps=20, guidance_scale=3.0, prompts=16, cost=0.5, psnr=50.0)}
    )
    path = tmp_path / "plan.json"
    path.write_text(plan.model_dump_json())
    assert Plan.read(path) == plan
    written = find_plan("block:2").model_dump()
    assert not {"guidance", "found", "predict"} & {*written, *written["rules"][0]}
