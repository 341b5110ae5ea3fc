"""Plain sampling with the diffusers classes, for validation while training; users sample with `runtime`."""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tuning.mini.latents import tokenize
from tuning.mini.models import scheduler
from tuning.mini.reading import read_captions
from tuning.mini.scenes import held_back_prompts

__all__ = ["accuracy", "sample"]


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    text: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    prompts: Sequence[str],
    *,
    steps: int = 20,
    guidance: float = 3.0,
    seed: int = 0,
    size: int = 64,
) -> Tensor:
    """Pictures (n, 3, size, size) in [-1, 1] of the prompts with DPM-Solver++ and classifier-free guidance."""
    solver = DPMSolverMultistepScheduler.from_config(scheduler().config)
    solver.set_timesteps(steps)
    device = next(unet.parameters()).device
    states = text(tokenize(tokenizer, [""] * len(prompts) + list(prompts)).to(device)).last_hidden_state
    shape = (len(prompts), 4, size // 8, size // 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    for t in solver.timesteps:
        plain, asked = unet(torch.cat([latents] * 2), t.to(device), states).sample.chunk(2)
        latents = solver.step(plain + guidance * (asked - plain), t, latents).prev_sample
    pictures: Tensor = vae.decode(latents / vae.config.scaling_factor).sample
    return pictures.clamp(-1, 1)


def accuracy(
    unet: UNet2DConditionModel,
    text: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    *,
    count: int = 64,
    seed: int = 1,
    steps: int = 20,
) -> dict[str, float]:
    """The share of held-back prompts right in each attribute by the rule reader.

    `seed` 1 is the list for validation: the published figures use the list of seed 0.
    """
    prompts = held_back_prompts(count, seed)
    parts = [sample(unet, text, tokenizer, vae, prompts[at : at + 64], steps=steps, seed=at) for at in range(0, count, 64)]
    return {f"right_{name}": share for name, share in read_captions(prompts, torch.cat(parts)).items()}
