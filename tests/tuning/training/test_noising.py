"""Noise and targets against the formulas of the papers, written out again; the same for one process as for several."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from tuning import TuningError
from tuning.mini.models import scheduler
from tuning.training.distributed import Workers
from tuning.training.noising import Noising

EMPTY = torch.zeros(5, dtype=torch.long)
TOKENS = torch.arange(1, 41).view(8, 5)


def noising(kind: str = "epsilon", rank: int = 0, count: int = 1, dropout: float = 0.5) -> Noising:
    place = cast(Workers, SimpleNamespace(rank=rank, count=count, device=torch.device("cpu")))
    schedule = DDPMScheduler.from_config(scheduler(prediction_type=kind).config)
    return Noising(schedule, place, empty=EMPTY, dropout=dropout)


def signal_and_noise(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled linear betas from 0.00085 to 0.012, as published for Stable Diffusion."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)[timesteps][:, None, None, None]
    return kept.sqrt(), (1 - kept).sqrt()


def test_epsilon_target_is_the_noise_that_was_added() -> None:
    latents = torch.randn(8, 4, 8, 8)
    drawn = noising("epsilon").batch(latents, TOKENS, 3)
    signal, sigma = signal_and_noise(drawn.timesteps)
    assert torch.allclose(drawn.noisy.double(), signal * latents + sigma * drawn.target, atol=1e-5)
    assert abs(float(drawn.target.std()) - 1) < 0.1


def test_velocity_target_is_the_angle_between_noise_and_latents() -> None:
    latents = torch.randn(8, 4, 8, 8)
    drawn = noising("v_prediction").batch(latents, TOKENS, 3)
    signal, sigma = signal_and_noise(drawn.timesteps)
    added = (drawn.noisy - signal * latents) / sigma
    assert torch.allclose(drawn.target.double(), signal * added - sigma * latents, atol=1e-3)
    assert torch.allclose(signal * drawn.noisy - sigma * drawn.target, latents.double(), atol=1e-4)


def test_timesteps_are_stratified_and_captions_dropped() -> None:
    drawn = noising().batch(torch.zeros(8, 4, 8, 8), TOKENS, 0)
    assert torch.equal(drawn.timesteps // 125, torch.arange(8)), "one timestep from each eighth"
    dropped = (drawn.tokens == 0).all(1)
    assert 0 < int(dropped.sum()) < 8
    assert torch.equal(drawn.tokens[~dropped], TOKENS[~dropped])
    fixed = noising().fixed(torch.zeros(8, 4, 8, 8), TOKENS, 1)
    assert torch.equal(fixed.tokens, TOKENS), "validation keeps all captions"
    assert torch.equal(fixed.noisy, noising().fixed(torch.zeros(8, 4, 8, 8), TOKENS, 1).noisy)


def test_two_processes_add_what_one_adds_to_a_batch_twice_as_large() -> None:
    latents = torch.randn(8, 4, 8, 8)
    whole = noising().batch(latents, TOKENS, 7)
    for rank, part in enumerate((slice(0, 4), slice(4, 8))):
        half = noising(rank=rank, count=2).batch(latents[part], TOKENS[part], 7)
        for name in ("noisy", "timesteps", "tokens", "target"):
            assert torch.equal(getattr(half, name), getattr(whole, name)[part]), name
    assert not torch.equal(noising().batch(latents, TOKENS, 8).noisy, whole.noisy)


def test_other_predictions_are_refused() -> None:
    with pytest.raises(TuningError, match="'sample'; distillation knows epsilon and v_prediction"):
        noising("sample")
