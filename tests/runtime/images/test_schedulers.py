"""Schedulers by name: how often they evaluate the model, and which numbers of steps they take."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import diffusers
import pytest
import torch

from runtime import RequestError
from runtime.images.schedulers import SCHEDULERS, check_scheduler, make_scheduler
from tests.support.reference import MINI, reference_scheduler

ROOT = Path(__file__).parents[3]
FOLDER = MINI / "scheduler"


@pytest.mark.parametrize("name", list(SCHEDULERS))
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 500])
def test_every_scheduler_takes_few_steps_and_many(name: str, steps: int) -> None:
    scheduler = make_scheduler(name, FOLDER, steps)
    evaluations = len(scheduler.timesteps)
    assert evaluations == {"pndm": steps + (steps > 1), "heun": 2 * steps - 1}.get(name, steps)
    latents = torch.ones(1, 4, 2, 2) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        sample = scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(torch.zeros_like(sample), timestep, latents, return_dict=False)[0]
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_timesteps_are_those_of_the_bundles_configuration(name: str) -> None:
    assert torch.equal(make_scheduler(name, FOLDER, 20).timesteps, reference_scheduler(name, 20).timesteps)


@pytest.mark.parametrize("kind", [*SCHEDULERS.values(), "UniPCMultistepScheduler", "LCMScheduler"])
@pytest.mark.parametrize("folder", [FOLDER, ROOT / "models" / "sd21" / "scheduler"])
def test_a_configuration_is_read_as_diffusers_reads_it(kind: str, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "scheduler_config.json").read_text())
    config |= {"use_karras_sigmas": False, "beta_end": 0.02, "_use_default_values": ["beta_end"], "of_another_class": [1]}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    ours = make_scheduler(kind, tmp_path, 5)
    theirs = getattr(diffusers, kind).from_pretrained(tmp_path, **({"skip_prk_steps": True} if kind == "PNDMScheduler" else {}))
    corrected = {"steps_offset", "clip_sample"}  # as diffusers' pipelines do
    assert {name: value for name, value in ours.config.items() if name not in corrected} == {
        name: value for name, value in theirs.config.items() if name not in corrected
    }


@pytest.mark.parametrize("steps", [0, -1, 501, 1000, 100000])
def test_steps_out_of_range(steps: int) -> None:
    with pytest.raises(RequestError, match=rf"steps = {steps}; choose from 1 to 500"):
        make_scheduler("ddim", FOLDER, steps)


def test_unknown_scheduler_lists_those_known() -> None:
    with pytest.raises(RequestError, match=r"unknown scheduler 'plms'; did you mean lms\? choose from: ddim, pndm, dpm\+\+, eu"):
        make_scheduler("plms", FOLDER, 20)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "DPMSolverSDEScheduler"])
def test_schedulers_of_other_models_are_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=rf"scheduler {name} is for other models .*; choose from: ddim"):
        check_scheduler(name)


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_none_of_ours_needs_scipy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without extras has none; diffusers takes it for settings that the embedded model does not have."""
    for module in [module for module in sys.modules if module.split(".")[0] == "scipy"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert len(make_scheduler(name, MINI / "scheduler", 4).timesteps) >= 4


def test_calls_do_not_share_a_scheduler() -> None:
    assert make_scheduler("dpm++", FOLDER, 5) is not make_scheduler("dpm++", FOLDER, 5)
