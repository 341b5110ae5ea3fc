"""What a found plan says of itself, and when a call is not what it was found for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import Bundle
from runtime import Pipeline, Plan, Rule, UNet, find_plan
from runtime.images.schedulers import make_scheduler
from runtime.plans.key_steps import Uniform
from runtime.plans.notes import Call, described_find, plan_notes
from runtime.plans.words import Found, Predict
from tests.support.commands import Command

FOUND = find_plan("skip:2").model_copy(
    update={"name": "found", "found": Found(scheduler="ddim", steps=4, guidance_scale=3.0, prompts=16, cost=0.75, psnr=61.5)}
)


def test_a_plan_says_what_it_was_found_for() -> None:
    assert described_find(find_plan("skip:2")) == ""
    line = described_find(FOUND)
    assert line == "found for 4 steps of ddim with guidance 3: MACs 0.75 of full, 61.5 dB to its pictures on 16 prompts"
    assert described_find(on("emoji")).startswith("found on emoji for 4 steps of ddim")


def on(source: str) -> Plan:
    assert FOUND.found is not None
    return FOUND.model_copy(update={"found": FOUND.found.model_copy(update={"source": source})})


def notes(pipeline: Pipeline, plan: Plan, call: Call, steps: int = 4) -> list[str]:
    schedule = pipeline.schedule(plan, [1000 * (1 - step / steps) for step in range(steps)], call.guided)
    return plan_notes(plan, schedule, call)


def test_a_call_of_another_kind_is_noted(mini_pipeline: Pipeline) -> None:
    """Whatever differs, in one note; what nobody knows does not."""
    same = Call("ddim", 4, 3.0)
    for call in (same, Call("DDIMScheduler", 4, 3.0), Call("", 0, None)):
        assert notes(mini_pipeline, on("mini"), call) == []
    assert notes(mini_pipeline, find_plan("full"), Call("dpm++", 20, 7.5)) == []
    differing = {
        Call("dpm++", 20, 3.0): "found for 4 steps of ddim, and this is 20 of dpm++: its pictures may be",
        Call("EulerDiscreteScheduler", 4, 3.0): "for 4 steps of ddim, and this is 4 of euler",
        Call("", 20, None): "for 4 steps of ddim, and this is 20 of a scheduler that is not known",
        Call("ddim", 4, 7.5): "found with guidance 3, and this is with 7.5",
    }
    for call, said in differing.items():
        (note,) = notes(mini_pipeline, on("mini"), call)
        assert said in note
    assert "was found on emoji, and this is mini: its pictures" in notes(mini_pipeline, on("emoji"), same)[0]
    (note,) = notes(mini_pipeline, on("emoji"), Call("pndm", 9, 1.0, guided=False))
    assert "for 4 steps of ddim, with guidance 3, on emoji, and this is 9 of pndm, with 1, mini" in note


def test_a_forecast_that_never_has_two_key_steps_is_noted(mini_pipeline: Pipeline) -> None:
    rules = tuple(
        Rule(units=(unit,), when=Uniform(every=every), predict=Predict(order=order))
        for unit, every, order in (("up.-2", 3, 1), ("up.-1.layer.-2", 30, 1), ("up.-1.layer.0", 30, 0), ("head", 30, 1))
    )
    noted = notes(mini_pipeline, Plan(name="p", rules=rules), Call(), steps=6)
    # The last step of a rule on the head is always a key step.
    assert [note[:15] for note in noted] == ["plan p: rules.1", "plan p: rules.3"]
    assert "over these 6 steps it has one: features are reused as they are" in noted[0]
    with pytest.warns(UserWarning, match="plan forecast:30: rules.0 forecasts from two key steps"):
        mini_pipeline.generate("a red star", plan="forecast:30", steps=2, output_type="latent")


@pytest.mark.parametrize(("walked", "steps"), [("ddim", 5), ("dpm++", 4), ("heun", 4)])
@pytest.mark.parametrize("known", [True, False])
def test_a_loop_of_ones_own_is_warned_of(
    mini_pipeline: Pipeline, mini_bundle: Bundle, known: bool, walked: str, steps: int
) -> None:
    """Without the scheduler by the number of evaluations alone, which dpm++ has as many of as ddim."""
    scheduler = make_scheduler(walked, mini_bundle.folder / "scheduler", steps)
    unet = UNet(mini_bundle.folder, on("emoji"), scheduler=scheduler if known else None)
    unet.pipeline = mini_pipeline
    text, sample = torch.zeros(1, 32, unet.config.cross_attention_dim), torch.zeros(1, 4, 8, 8)
    with pytest.warns(UserWarning, match=r"plan found was found .*on emoji") as warned:
        unet(sample, scheduler.timesteps[0], text)
    (said,) = [str(each.message) for each in warned]
    if known:
        assert f"found for 4 steps of ddim, on emoji, and this is {steps} of {walked}, mini" in said
    elif walked == "dpm++":
        assert "found on emoji, and this is mini" in said
    else:
        assert f"and this is {len(scheduler.timesteps)} of a scheduler that is not known, mini" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unet(sample, scheduler.timesteps[0], text)


@pytest.fixture(autouse=True)
def not_warned_yet(mini_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests' calls of the shared pipeline may have been warned of already."""
    monkeypatch.setattr(mini_pipeline, "_warned", set())


def test_a_call_of_another_kind_is_warned_of_once(mini_pipeline: Pipeline) -> None:
    with pytest.warns(UserWarning, match="plan found was found for 4 steps of ddim, and this is 3 of ddim"):
        mini_pipeline.generate("a red star", plan=FOUND, steps=3, scheduler="ddim")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mini_pipeline.generate("a red star", plan=FOUND, steps=3, scheduler="ddim")
        mini_pipeline.generate("a red star", plan=FOUND, steps=4, scheduler="ddim")


def test_halves_without_guidance_are_noted_once(mini_pipeline: Pipeline, runtime: Command, mini_bundle: Bundle) -> None:
    """They do nothing there, and are no error."""
    options: dict[str, Any] = {"steps": 2, "scheduler": "ddim", "output_type": "latent"}
    with pytest.warns(UserWarning, match="plan guide:2 says at which steps guidance evaluates both of its halves, and without"):
        made = mini_pipeline.generate("a red star", plan="guide:2", guidance_scale=1, **options)
    assert torch.equal(made.latents, mini_pipeline.generate("a red star", guidance_scale=1, **options).latents)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mini_pipeline.generate("a red star", plan="guide:2", guidance_scale=1, **options)
        mini_pipeline.generate("a red star", plan="guide:2", guidance_scale=3, **options)
    given = ("a red star", "--bundle", mini_bundle.folder, "--plan", "guide:2", "--explain", "--steps", 2)
    assert "that part of the plan does nothing" in runtime(*given, "--guidance", 1).out[-1]
    assert "does nothing" not in runtime(*given, "--guidance", 3).out[-1]


def test_explain_prints_it(runtime: Command, mini_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    path.write_text(FOUND.model_dump_json())
    outcome = runtime(
        "a red star", "--bundle", mini_bundle.folder, "--plan", path, "--explain", "--steps", 4, "--scheduler", "ddim"
    )
    assert outcome.out[-1].startswith("found for 4 steps of ddim with guidance 3: MACs 0.75 of full")
