"""The denoising loop on the executor alone: no text encoder, no VAE, no pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from runtime import Executor, LoadedBundle, Plan, Schedule, StepRecord
from runtime.images.prediction_spaces import PredictionSpaces
from runtime.plans.checks import check_runs
from tests.support.unets import TEXT_WIDTH, TOKENS


def small_inputs() -> tuple[Tensor, Tensor]:
    """Noise for two pictures of 8x16 latents, and their text features."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 4, 8, 16, generator=generator), torch.randn(2, TOKENS, TEXT_WIDTH, generator=generator)


def denoise(
    networks: Mapping[str, LoadedBundle], scheduler: Any, latents: Tensor, text: Tensor, plan: Plan, guidance: float = 1.0
) -> tuple[Tensor, list[StepRecord]]:
    """Final latents and records of a plan.

    Args:
        networks: loaded UNets by the names that the plan uses; a plan that names none takes the first.
        scheduler: with its timesteps set.
        latents: (images, channels, height, width), already times the scheduler's initial sigma.
        text: (rows, tokens, width); with guidance the negative rows come first.
        plan: what runs.
        guidance: above 1 for classifier-free guidance.
    """
    manifests = {name: network.manifest for name, network in networks.items()}
    schedule = Schedule(plan.checked(), manifests, scheduler.timesteps.tolist(), guided=guidance > 1)
    check_runs(schedule)
    spaces = PredictionSpaces(scheduler.alphas_cumprod, scheduler.config.prediction_type)
    executor, records = Executor(networks, schedule, spaces=spaces), []
    for index, timestep in enumerate(scheduler.timesteps):
        sample = scheduler.scale_model_input(latents, timestep)
        sample = torch.cat([sample] * 2) if guidance > 1 else sample
        prediction, record = executor.step(index, sample, timestep.reshape(1).float(), text)
        if guidance > 1:
            negative, positive = prediction.chunk(2)
            prediction = negative + guidance * (positive - negative)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
        records.append(record)
    return latents, records
