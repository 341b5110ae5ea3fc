"""The step index is counted, not looked up: schedulers that evaluate the model twice at one timestep keep their schedule."""

from __future__ import annotations

from collections import Counter

import pytest

from engines import Bundle
from runtime import Pipeline
from tests.support.reference import reference_scheduler

# Model evaluations for 6 steps, and whether a timestep comes twice.
EVALUATIONS = {"ddim": (6, False), "pndm": (7, True), "dpm++": (6, False), "euler": (6, False), "heun": (11, True)}


@pytest.mark.parametrize("scheduler", list(EVALUATIONS))
@pytest.mark.parametrize("every", [2, 3])
def test_records_count_model_evaluations(mini_pipeline: Pipeline, scheduler: str, every: int) -> None:
    made = mini_pipeline.generate("a blue ring", steps=6, scheduler=scheduler, plan=f"deepcache:{every}")
    count, repeats = EVALUATIONS[scheduler]
    timesteps = [float(timestep) for timestep in reference_scheduler(scheduler, 6).timesteps]
    assert [record.index for record in made.steps] == list(range(count))
    assert [record.timestep for record in made.steps] == timesteps
    assert (max(Counter(timesteps).values()) > 1) == repeats
    assert [record.kind for record in made.steps] == ["inherit" if index % every else "key" for index in range(count)]


def test_records_say_what_ran_and_what_was_inherited(mini_pipeline: Pipeline) -> None:
    ends = {"text_encoder", "vae_decoder", "vae_encoder"}
    segments = [segment.name for segment in mini_pipeline.manifest.segments if segment.name not in ends]
    made = mini_pipeline.generate("a blue ring", steps=4, scheduler="heun", plan="deepcache:3")
    for record in made.steps:
        key = record.kind == "key"
        assert record.ran == (tuple(segments) if key else ("stem", "up.3.layer.2", "head"))
        assert record.inherited == (() if key else ("up.3.layer.1.attention",))
        assert record.unet == "original"
        assert record.seconds > 0
    assert made.plan.name == "deepcache:3"
    assert made.seconds >= sum(record.seconds for record in made.steps)


def test_records_of_a_plan_that_switches_say_which_unet_ran(assembled_bundle: Bundle, mini_pipeline: Pipeline) -> None:
    made = mini_pipeline.generate("a blue ring", steps=6, scheduler="ddim", plan="switch:0.4+block:2")
    # Timesteps from 831 (or as the scheduler has it) down: those at less than 0.4 of the noise schedule are the assembled UNet's.
    early = [1 - record.timestep / 1000 < 0.4 for record in made.steps]
    assert [record.unet for record in made.steps] == ["assembled" if is_early else "original" for is_early in early]
    assert 1 < sum(early) < 6
    # The switch is a key step, whatever the rule says.
    keys = {0, 2, 4, sum(early)}
    assert {record.index for record in made.steps if record.kind == "key"} == keys
    inner = {name: {s.name for s in mini_pipeline.networks[name].manifest.segments} for name in ("assembled", "original")}
    for record in made.steps:
        assert set(record.ran) <= inner[record.unet]
        assert (record.inherited == ()) == (record.index in keys)
        assert 0 < record.seconds < made.seconds


def test_full_runs_everything_at_every_step(mini_pipeline: Pipeline) -> None:
    made = mini_pipeline.generate("a blue ring", steps=3, scheduler="pndm", plan="full")
    assert {record.kind for record in made.steps} == {"key"}
    assert {len(record.ran) for record in made.steps} == {len(mini_pipeline.manifest.segments) - 3}
