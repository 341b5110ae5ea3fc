"""The inputs of a UNet while pictures are made: noisy latents, timesteps and text states along real denoising trajectories."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor

from runtime.embedded import EXAMPLES
from tuning.checkpoints.configs import text_width
from tuning.checkpoints.find_source import UNetSource
from tuning.checkpoints.source import Source
from tuning.embedded import held_back_prompts
from tuning.mini.models import scheduler
from tuning.training.noising import tokenize

__all__ = ["Points", "trajectories"]

_TOKENS = 77
_PROMPTS_OF = "mini"
"""Whose prompts other models are given."""


@dataclass(frozen=True)
class Points:
    """Latents (n, c, h, w), timesteps (n,), text states (n, length, width), and whether the text states are of prompts."""

    latents: Tensor
    timesteps: Tensor
    states: Tensor
    has_text: bool

    def __len__(self) -> int:
        return len(self.latents)


@torch.no_grad()
def trajectories(
    source: UNetSource,
    unet: UNet2DConditionModel,
    *,
    prompts: int,
    steps: int,
    guidance: float,
    side: int,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> Points:
    """Every step's latents on the way to `prompts` pictures, with DPM-Solver++ and classifier-free guidance.

    Prompts are what the embedded model was not trained on. A source that is only a UNet gets random text states and
    Stable Diffusion's noise schedule.

    Points are on the UNet's device.

    Raises:
        TuningError: the checkpoint's text encoder, tokenizer or scheduler is missing or damaged.
    """
    source_of_noise = torch.Generator().manual_seed(seed)
    if source.whole is None:
        config = scheduler(prediction_type="epsilon").config
        states = torch.randn((prompts + 1, _TOKENS, text_width(unet.config)), generator=source_of_noise)
    else:
        states, config = _read(source.whole, prompts)
    device = unet.device
    states = states.to(device)
    plain, asked = states[:1].expand(prompts, -1, -1), states[1:]
    solver = DPMSolverMultistepScheduler.from_config(config)
    solver.set_timesteps(steps)
    latents = torch.randn((prompts, unet.config.in_channels, side, side), generator=source_of_noise).to(device)
    found = []
    for t in solver.timesteps:
        found.append(latents)
        first, second = unet(torch.cat([latents] * 2), t.to(device), torch.cat([plain, asked])).sample.chunk(2)
        latents = solver.step(first + guidance * (second - first), t, latents).prev_sample
        tick()
    timesteps = solver.timesteps.repeat_interleave(prompts).to(device)
    return Points(torch.cat(found), timesteps, asked.repeat(steps, 1, 1), source.whole is not None)


def _read(source: Source, prompts: int) -> tuple[Tensor, Any]:
    """Text states of the empty prompt and of `prompts` others, and the scheduler's configuration."""
    text = source.model("text_encoder")
    tokenizer = source.tokenizer(text.config)
    known = source.name if source.name in EXAMPLES else _PROMPTS_OF
    words = ["", *held_back_prompts(known, prompts, seed=2)]  # seeds 0 and 1 are for published figures and for validation
    return text(tokenize(tokenizer, words)).last_hidden_state, source.scheduler_config()
