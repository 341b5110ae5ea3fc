"""Where a call starts: from noise, or from a picture that noise was added to (SDEdit, arXiv 2108.01073); and inpainting.

Random numbers of picture i come from a generator of its own with seed + i, so that they do not depend on how many pictures are
made together. With one picture all is as in diffusers' text-to-image, image-to-image and inpainting pipelines; of several, theirs
for inpainting take one sample of the original's latents for all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.errors import RequestError

__all__ = ["Repaint", "Start", "from_noise", "from_picture", "timesteps_from"]


@dataclass(frozen=True)
class Repaint:
    """Inpainting by latent blending: after every step, what the mask leaves out gets the original's latents back.

    ``mask`` is (1, 1, height, width) of zeros and ones, ``known`` and ``noise`` are (images, channels, height, width). The
    original's latents carry the noise of the step that comes next, and none after the last.
    """

    mask: Tensor
    known: Tensor
    noise: Tensor

    def blend(self, latents: Tensor, scheduler: Any, following: Tensor) -> Tensor:
        """The latents after a step, blended; ``following`` are the timesteps still to come."""
        known = scheduler.add_noise(self.known, self.noise, following[:1]) if len(following) else self.known
        return (1 - self.mask) * known + self.mask * latents


@dataclass(frozen=True)
class Start:
    """The first latents (images, channels, height, width), the timesteps that run, and what inpainting keeps."""

    latents: Tensor
    timesteps: Tensor
    repaint: Repaint | None = None


def timesteps_from(scheduler: Any, steps: int, strength: float) -> Tensor:
    """The last ``strength`` of a scheduler's timesteps, counted as diffusers does; the scheduler is told where it begins.

    Raises:
        RequestError: the strength is outside (0, 1], or leaves no step to run.
    """
    if not 0 < strength <= 1:
        raise RequestError(f"strength = {strength}; choose a number above 0 (the image as it is) and up to 1 (nothing of it)")
    running = int(steps * strength)
    if running < 1:
        raise RequestError(f"strength = {strength} of {steps} steps leaves none to run; ask for more steps or strength")
    start = (steps - running) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    timesteps: Tensor = scheduler.timesteps[start:]
    return timesteps


def from_noise(scheduler: Any, shape: Sequence[int], seeds: Sequence[int], device: torch.device) -> Start:
    """Start from nothing but noise. ``shape`` is (channels, height, width)."""
    (noise,) = _draws(shape, seeds, 1, device)
    return Start(noise * scheduler.init_noise_sigma, scheduler.timesteps)


def from_picture(
    scheduler: Any, distribution: Tensor, mask: Tensor | None, timesteps: Tensor, strength: float, seeds: Sequence[int]
) -> Start:
    """Start from a picture's latents and noise.

    Args:
        scheduler: with its timesteps set, and told where it begins.
        distribution: what the VAE's encoder makes of the picture (1, 2 * channels, height, width): means, then deviations.
        mask: (1, 1, height, width), of ones where to repaint; None for the whole picture.
        timesteps: those that run.
        strength: at 1 inpainting starts from noise alone, as in diffusers.
        seeds: of each picture.
    """
    mean, deviation = distribution.chunk(2, dim=1)
    drawn, noise = _draws(mean.shape[1:], seeds, 2, mean.device)
    known = mean + deviation * drawn
    if mask is not None and strength == 1:
        latents = noise * scheduler.init_noise_sigma
    else:
        latents = scheduler.add_noise(known, noise, timesteps[:1])
    return Start(latents, timesteps, None if mask is None else Repaint(mask.to(mean.device), known, noise))


def _draws(shape: Sequence[int], seeds: Sequence[int], count: int, device: torch.device) -> list[Tensor]:
    """Standard normal numbers (images, channels, height, width), ``count`` times, drawn on the CPU whatever the device."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(device) for _ in range(count)]
