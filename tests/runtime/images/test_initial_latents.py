"""Inpainting's noise levels, made once before the loop, are those that a scheduler adds in it; and nothing there waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runtime.images.initial_latents import LatentBlend, from_picture, generators_of, timesteps_from
from runtime.images.schedulers import SCHEDULERS, make_scheduler
from tests.support.reference import MINI

STEPS = 7


def started(name: str, strength: float) -> tuple[Any, torch.Tensor, LatentBlend]:
    """A scheduler before its first step, the timesteps that run, and what inpainting of two pictures keeps."""
    scheduler = make_scheduler(name, MINI / "scheduler", STEPS)
    timesteps = timesteps_from(scheduler, STEPS, strength)
    distribution = torch.randn(1, 8, 6, 5, generator=torch.Generator().manual_seed(0)).abs()
    mask = torch.zeros(1, 1, 6, 5)
    mask[..., 2:4, 1:3] = 1
    start = from_picture(scheduler, distribution, mask, timesteps, strength, generators_of((1, 2)), 4)
    assert start.repaint is not None
    return scheduler, timesteps, start.repaint


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.2])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_they_are_those_of_add_noise_in_the_loop(name: str, strength: float) -> None:
    scheduler, timesteps, repaint = started(name, strength)
    latents = torch.ones(2, 4, 6, 5)
    assert len(repaint.levels) == len(timesteps)
    for index, timestep in enumerate(timesteps):
        scheduler.step(torch.zeros_like(latents), timestep, latents)
        following = timesteps[index + 1 :][:1]
        known = scheduler.add_noise(repaint.known, repaint.noise, following) if len(following) else repaint.known
        expected = (1 - repaint.mask) * known + repaint.mask * latents
        assert torch.equal(repaint.blend(latents, index), expected), index


def test_the_scheduler_is_left_as_it_was() -> None:
    scheduler, timesteps, _ = started("heun", 0.6)
    assert scheduler.step_index is None
    assert scheduler.begin_index == len(scheduler.timesteps) - len(timesteps)


def test_the_loop_asks_no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, timesteps, repaint = started("dpm++", 0.6)
    monkeypatch.setattr(type(scheduler), "add_noise", lambda *given: pytest.fail("looked up on the host"))
    for index in range(len(timesteps)):
        assert repaint.blend(torch.zeros(2, 4, 6, 5), index).shape == (2, 4, 6, 5)
