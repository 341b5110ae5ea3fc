"""Plain sampling with the diffusers classes, for validation while training; users sample with `runtime`."""

from collections.abc import Sequence

import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor

from tuning.training.teacher import Teacher

__all__ = ["sample"]


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    model: Teacher,
    prompts: Sequence[str],
    *,
    steps: int = 20,
    guidance: float = 7.5,
    seed: int = 0,
    size: int | None = None,
) -> Tensor:
    """Pictures (n, 3, size, size) in [-1, 1] that `unet` draws of the prompts; all else is the model's.

    DPM-Solver++ on the model's own noise schedule, with classifier-free guidance; `size` in pixels, by default the model's.
    """
    solver = DPMSolverMultistepScheduler.from_config(model.schedule.config)
    solver.set_timesteps(steps)
    device = next(unet.parameters()).device
    states = model.states(model.ids([""] * len(prompts) + list(prompts)).to(device))
    side = (size or model.size) // model.scale
    shape = (len(prompts), unet.config.in_channels, side, side)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    for t in solver.timesteps:
        plain, asked = unet(torch.cat([latents] * 2), t.to(device), states).sample.float().chunk(2)
        latents = solver.step(plain + guidance * (asked - plain), t, latents).prev_sample
    return model.decode(latents)
