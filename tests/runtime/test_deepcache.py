"""``deepcache:N`` is DeepCache (arXiv 2312.00858): the same latents as its authors' package."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime import Pipeline
from tests.reference import mini_text, mini_unet, reference_noise, reference_scheduler

DeepCache = pytest.importorskip("DeepCache", reason="the peer to compare with is not installed (extra: test)")

PROMPT, NEGATIVE = "a small yellow heart on a black background", ""
GUIDANCE, STEPS = 5.0, 10
TOLERANCE = 1e-3
"""Of the largest final latent: the two run other kernels (ONNX Runtime and PyTorch), which differ by 1e-6 a step before guidance
multiplies it; with a step's features from one step earlier or later they differ by more than 1e-2."""


@torch.no_grad()
def peer_latents(interval: int) -> Tensor:
    """DeepCache's own way: it wraps the UNet's modules, and finds the step by looking its timestep up."""
    unet: Any = mini_unet()
    noise = reference_scheduler("ddim", STEPS)
    helper = DeepCache.DeepCacheSDHelper(pipe=SimpleNamespace(unet=unet, scheduler=noise))
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    latents, text = reference_noise(4, 2, 4, 8, 8), mini_text([NEGATIVE] * 2 + [PROMPT] * 2)
    helper.enable()
    try:
        for timestep in noise.timesteps:
            prediction = unet(torch.cat([latents] * 2), timestep, encoder_hidden_states=text).sample
            negative, positive = prediction.chunk(2)
            latents = noise.step(negative + GUIDANCE * (positive - negative), timestep, latents).prev_sample
    finally:
        helper.disable()
    return latents


@pytest.mark.parametrize("interval", [2, 3, 5])
def test_latents_are_those_of_the_deepcache_package(mini_pipeline: Pipeline, interval: int) -> None:
    made = mini_pipeline.generate(
        PROMPT,
        NEGATIVE,
        steps=STEPS,
        guidance_scale=GUIDANCE,
        seed=4,
        num_images=2,
        scheduler="ddim",
        plan=f"deepcache:{interval}",
    )
    peer = peer_latents(interval)
    assert float((made.latents - peer).abs().max() / peer.abs().max()) < TOLERANCE


def test_parity_is_not_for_want_of_a_difference(mini_pipeline: Pipeline) -> None:
    full = mini_pipeline.generate(
        PROMPT, NEGATIVE, steps=STEPS, guidance_scale=GUIDANCE, seed=4, num_images=2, scheduler="ddim", plan="full"
    )
    peer = peer_latents(3)
    assert float((full.latents - peer).abs().max() / peer.abs().max()) > 10 * TOLERANCE
