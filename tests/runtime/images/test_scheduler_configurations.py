"""Any scheduler configuration gives the latents of diffusers' pipeline as it is after loading: all three tasks, all schedulers.

Pipelines correct the configuration as they load (clip_sample, steps_offset, skip_prk_steps), and not all alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from torch import Tensor

from engines import UserError
from runtime import NonFiniteError, Pipeline
from runtime.images.schedulers import make_scheduler
from tests.support.diffusers_pipelines import NEGATIVE, PROMPT, SEED, inputs, latents, pipeline
from tests.support.scheduler_configs import CLASSES, configurations
from tests.support.unets import relative_error

TOLERANCE = 1e-4
"""Of the largest final latent; both sides are float32 and sum in another order."""
ROUNDING = 1e-6
"""Of one evaluation, as a share of its largest element: what float32 sums in another order differ by."""
ROUNDED = 8
"""Trajectories that show what rounding does to the truth: it can decide a jump, so one would not tell."""
EXAMPLES = int(os.environ.get("SCHEDULER_EXAMPLES", "12"))
STEPS = 5


def written(config: dict[str, Any], folder: Path) -> Path:
    """A folder with a scheduler's configuration, as a bundle or a checkpoint has it."""
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


def with_scheduler(made: Pipeline, config: dict[str, Any], folder: Path) -> Pipeline:
    """A loaded pipeline of a bundle that has another scheduler configuration."""
    changed = Pipeline.__new__(Pipeline)
    changed.__dict__.update(made.__dict__)
    changed.bundle = dataclasses.replace(made.bundle, folder=written(config, folder))
    return changed


def diffusers_latents(
    kind: str, name: str, config: dict[str, Any], folder: Path, after_unet: Callable[..., Any] | None = None, **options: Any
) -> Tensor | None:
    """Final latents of diffusers' pipeline with that scheduler, and with that hook on its UNet; None where it fails."""
    try:
        scheduler = getattr(diffusers, CLASSES.get(name, name)).from_pretrained(written(config, folder), subfolder="scheduler")
        made = pipeline(kind, scheduler)
        hook = made.unet.register_forward_hook(after_unet) if after_unet is not None else contextlib.nullcontext()
        with hook:
            return latents(made, steps=STEPS, **options)
    except (ValueError, TypeError, IndexError, NotImplementedError, RuntimeError):
        return None


class Rounding:
    """A forward hook that adds to the prediction what another order of summing might: noise of ROUNDING, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, _module: Any, _inputs: Any, output: tuple[Tensor]) -> tuple[Tensor]:
        noise = torch.randn(output[0].shape, generator=self.generator)
        return (output[0] + ROUNDING * output[0].abs().max() * noise,)


def check(made: Pipeline, kind: str, name: str, config: dict[str, Any], folder: Path) -> None:
    options = inputs(kind, 0.6)
    expected = diffusers_latents(kind, name, config, folder, **options)
    changed = with_scheduler(made, config, folder)

    def ours() -> Tensor:
        return changed.generate(PROMPT, NEGATIVE, seed=SEED, steps=STEPS, scheduler=name, **options).latents

    if expected is None:  # we may get further (schedulers that find the wrong one of two equal timesteps), or say what is wrong
        with contextlib.suppress(UserError):
            ours()
    elif not bool(torch.isfinite(expected).all()):
        with pytest.raises(NonFiniteError):
            ours()
    elif (error := relative_error(ours(), expected)) >= TOLERANCE:
        # Where latents diverge (thousands, not ones), every step multiplies rounding: the truth is no more certain than this.
        rounded = [diffusers_latents(kind, name, config, folder, Rounding(seed), **options) for seed in range(ROUNDED)]
        assert error < 3 * max(relative_error(other, expected) for other in rounded if other is not None)


SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DIVERGING = {
    "_class_name": "HeunDiscreteScheduler",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2",
    "num_train_timesteps": 400,
    "timestep_spacing": "trailing",
    "skip_prk_steps": True,
}
BARE_DDIM = {"_class_name": "DDIMScheduler", **SD_BETAS}


LEARNED = {**SD_BETAS, "prediction_type": "v_prediction", "variance_type": "learned_range", "algorithm_type": "dpmsolver++"}


@pytest.mark.parametrize("name", ["deis", "lms", "dpm++"])
def test_a_variance_that_a_scheduler_does_not_read_changes_nothing(mini_pipeline: Pipeline, tmp_path: Path, name: str) -> None:
    classes = {"deis": "DEISMultistepScheduler", "lms": "LMSDiscreteScheduler", **CLASSES}
    config = {"_class_name": classes[name], **LEARNED}
    folder = written(config, tmp_path)
    scheduler = getattr(diffusers, classes[name]).from_pretrained(folder, subfolder="scheduler")
    expected = latents(pipeline("text", scheduler), steps=STEPS)
    changed = with_scheduler(mini_pipeline, config, tmp_path)
    made = changed.generate(PROMPT, NEGATIVE, seed=SEED, steps=STEPS, scheduler=name)
    assert relative_error(made.latents, expected) < TOLERANCE


@pytest.mark.parametrize("kind", ["text", "image", "inpaint"])
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=configurations())
@example(drawn=("ddim", BARE_DDIM))
@example(drawn=("pndm", {"_class_name": "PNDMScheduler", **SD_BETAS}))
@example(drawn=("dpm++", {"_class_name": "PNDMScheduler", **SD_BETAS, "skip_prk_steps": True}))
@example(drawn=("euler", {"_class_name": "EulerDiscreteScheduler", **SD_BETAS, "timestep_spacing": "leading"}))
@example(drawn=("dpm++", {"_class_name": "DPMSolverMultistepScheduler", **SD_BETAS, "algorithm_type": "sde-dpmsolver++"}))
@example(drawn=("heun", DIVERGING))
def test_latents_are_those_of_the_pipeline_as_loaded(
    mini_pipeline: Pipeline, tmp_path: Path, kind: str, drawn: tuple[str, dict[str, Any]]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(mini_pipeline, kind, *drawn, tmp_path)


def public(config: Any) -> dict[str, Any]:
    """A configuration without what libraries note for themselves."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize("kind", ["text", "image", "inpaint"])
def test_corrections_are_those_of_the_pipelines_constructor(tmp_path: Path, kind: str) -> None:
    """Every key of every scheduler: after loading into a pipeline and by our hand, the configurations are the same."""
    config = SD_BETAS | {"steps_offset": 3, "clip_sample": True, "skip_prk_steps": False}
    for name in CLASSES:
        folder = written({"_class_name": CLASSES[name], **config}, tmp_path)
        loaded = pipeline(kind, getattr(diffusers, CLASSES[name]).from_pretrained(folder, subfolder="scheduler")).scheduler
        ours = make_scheduler(name, folder / "scheduler", STEPS, inpainting=kind == "inpaint")
        assert public(ours.config) == public(loaded.config), name


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        "{",
        "3",
        '{"num_train_timesteps": "many"}',
        '{"beta_schedule": "cubic"}',
        '{"num_train_timesteps": 0}',
        '{"trained_betas": 3}',
        '{"beta_start": null}',
        '{"solver_order": "two", "algorithm_type": 4}',
        '{"timestep_spacing": "nowhere"}',
    ],
)
@pytest.mark.parametrize("name", list(CLASSES))
def test_a_configuration_that_cannot_be_used_is_one_line(tmp_path: Path, config: str, name: str) -> None:
    (tmp_path / "scheduler_config.json").write_text(config)
    message = ""
    try:
        make_scheduler(name, tmp_path, STEPS)
    except UserError as error:
        message = str(error)
    # Some schedulers do not read what is wrong here; where one does, it is one line that names the file, or the steps.
    assert len(message.splitlines()) <= 1
    assert not message or str(tmp_path) in message


def test_a_variance_that_no_unet_predicts_is_one_line(tmp_path: Path) -> None:
    """diffusers' scheduler stumbles over the channels at the first step; where it reads no variance, the setting is none."""
    config = {"_class_name": CLASSES["dpm++"], **SD_BETAS, "algorithm_type": "dpmsolver++", "variance_type": "learned_range"}
    folder = written(config, tmp_path) / "scheduler"
    with pytest.raises(UserError, match=r"scheduler_config\.json has variance_type 'learned_range', and this UNet predicts none"):
        make_scheduler("dpm++", folder, STEPS)
    for name in ("ddim", "deis", "lcm", "lms"):
        assert len(make_scheduler(name, folder, STEPS).timesteps) == STEPS
