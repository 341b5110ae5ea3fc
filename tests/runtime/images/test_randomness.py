"""Every random number comes from the picture's own generator: one seed, one picture, alone and in a batch, as in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from runtime import Pipeline
from tests.runtime.images.test_scheduler_configurations import SD_BETAS, TOLERANCE, with_scheduler, written
from tests.support.diffusers_pipelines import NEGATIVE, PROMPT, SEED, inputs, latents, pipeline
from tests.support.unets import relative_error

DRAWING: dict[str, dict[str, Any]] = {
    "dpm++": {"algorithm_type": "sde-dpmsolver++", "steps_offset": 1, "prediction_type": "v_prediction"},
    "EulerAncestralDiscreteScheduler": {"prediction_type": "v_prediction", "steps_offset": 1},
    "DDPMScheduler": {"prediction_type": "v_prediction", "clip_sample": False},
    "KDPM2AncestralDiscreteScheduler": {"prediction_type": "v_prediction", "steps_offset": 1},
    "DPMSolverSinglestepScheduler": {"algorithm_type": "sde-dpmsolver++", "prediction_type": "v_prediction"},
}
CLASS = {"dpm++": "DPMSolverMultistepScheduler"}


def configured(name: str, made: Pipeline, folder: Path) -> tuple[Pipeline, Any]:
    """Our pipeline with a scheduler that draws at every step, and diffusers' scheduler with the same configuration."""
    kind = CLASS.get(name, name)
    config = {"_class_name": kind, **SD_BETAS, **DRAWING[name]}
    scheduler = getattr(diffusers, kind).from_pretrained(written(config, folder), subfolder="scheduler")
    return with_scheduler(made, config, folder), scheduler


@pytest.mark.parametrize("name", list(DRAWING))
@pytest.mark.parametrize("kind", ["text", "image", "inpaint"])
def test_draws_are_those_of_diffusers_with_the_pictures_generator(
    mini_pipeline: Pipeline, tmp_path: Path, kind: str, name: str
) -> None:
    ours, scheduler = configured(name, mini_pipeline, tmp_path)
    options = {**inputs(kind), "steps": 5}
    made = ours.generate(PROMPT, NEGATIVE, seed=SEED, scheduler=name, **options)
    torch.manual_seed(99)  # nobody's generator
    assert relative_error(made.latents, latents(pipeline(kind, scheduler), **options)) < TOLERANCE


@pytest.mark.parametrize("name", list(DRAWING))
def test_a_seed_gives_one_picture_alone_and_in_a_batch(mini_pipeline: Pipeline, tmp_path: Path, name: str) -> None:
    ours, _ = configured(name, mini_pipeline, tmp_path)
    options: dict[str, Any] = {"steps": 4, "scheduler": name, "plan": "deepcache:2"}
    batch = ours.generate(PROMPT, seed=4, num_images=3, **options)
    for number in range(3):
        torch.manual_seed(number)
        alone = ours.generate(PROMPT, seed=4 + number, **options)
        assert relative_error(batch.latents[number : number + 1], alone.latents) < TOLERANCE
    assert relative_error(batch.latents[:1], batch.latents[1:2]) > 0.1
