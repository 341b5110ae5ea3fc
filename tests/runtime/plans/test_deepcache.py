"""``deepcache:N`` is DeepCache (arXiv 2312.00858): the same latents as its authors' package."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime import Pipeline, Plan, Rule
from runtime.plans.key_steps import Uniform
from tests.support.denoise import denoise
from tests.support.reference import mini_text, mini_unet, reference_noise, reference_scheduler
from tests.support.unets import TOKENS, live_network, manifest_of

DeepCache = pytest.importorskip("DeepCache", reason="the peer to compare with is not installed (extra: test)")

PROMPT, NEGATIVE = "a small yellow heart on a black background", ""
GUIDANCE, STEPS = 5.0, 10
TOLERANCE = 1e-3
"""Of the largest final latent: the two run other kernels (ONNX Runtime and PyTorch), which differ by 1e-6 a step before guidance
multiplies it; with a step's features from one step earlier or later they differ by more than 1e-2."""

BRANCH_TOLERANCE = 1e-5


@cache
def unet() -> Any:
    """The embedded model's. The package takes its wrappers off when it is done."""
    return mini_unet()


@cache
@torch.no_grad()
def peer_latents(interval: int, branch: int = 0, tokens: int | None = None) -> Tensor:
    """DeepCache's own way: it wraps the UNet's modules, and finds the step by looking its timestep up."""
    noise = reference_scheduler("ddim", STEPS)
    helper = DeepCache.DeepCacheSDHelper(pipe=SimpleNamespace(unet=unet(), scheduler=noise))
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    latents, text = reference_noise(4, 2, 4, 8, 8), mini_text([NEGATIVE] * 2 + [PROMPT] * 2)[:, :tokens]
    helper.enable()
    try:
        for timestep in noise.timesteps:
            prediction = unet()(torch.cat([latents] * 2), timestep, encoder_hidden_states=text).sample
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


def inherited_by(branch: int) -> str:
    """What DeepCache keeps for a branch of the embedded model, whose up blocks have three layers each; branch 0 is outermost.

    It is what the first layer that runs again reads from below: the layer before, or the end of the block before.
    """
    block, layer = divmod(branch, 3)
    if layer < 2:
        return f"up.-{block + 1}.layer.-{layer + 2}"
    return f"up.-{block + 2}.sampler" if block < 3 else "mid"


@pytest.mark.parametrize("branch", range(12))
@pytest.mark.slow
def test_every_branch_on_the_way_up_is_a_plan(branch: int) -> None:
    plan = Plan(name="branch", rules=(Rule(units=(inherited_by(branch),), when=Uniform(every=3)),))
    noise, manifest = reference_scheduler("ddim", STEPS), manifest_of(unet(), None, [plan])
    latents, text = reference_noise(4, 2, 4, 8, 8), mini_text([NEGATIVE] * 2 + [PROMPT] * 2)[:, :TOKENS]
    latents, _ = denoise({"one": live_network(unet(), manifest)}, noise, latents, text, plan, GUIDANCE)
    peer, other = peer_latents(3, branch, TOKENS), peer_latents(3, (branch + 1) % 12, TOKENS)
    # Both run PyTorch's kernels here and differ by 2e-6, where the next branch, deep in this small UNet, differs by 3e-5 or more.
    assert float((latents - peer).abs().max() / peer.abs().max()) < BRANCH_TOLERANCE
    assert float((latents - other).abs().max() / peer.abs().max()) > 2 * BRANCH_TOLERANCE


def test_parity_is_not_for_want_of_a_difference(mini_pipeline: Pipeline) -> None:
    full = mini_pipeline.generate(
        PROMPT, NEGATIVE, steps=STEPS, guidance_scale=GUIDANCE, seed=4, num_images=2, scheduler="ddim", plan="full"
    )
    peer = peer_latents(3)
    assert float((full.latents - peer).abs().max() / peer.abs().max()) > 10 * TOLERANCE
