"""Where a call starts: from noise, or from a picture that noise was added to (SDEdit, arXiv 2108.01073); and inpainting.

Random numbers of picture i come from a generator of its own with seed + i, so that they do not depend on how many pictures are
made together. With one picture all is as in diffusers' text-to-image, image-to-image and inpainting pipelines; of several, theirs
for inpainting take one sample of the original's latents for all.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engines.lazy import postponed
from runtime.errors import RequestError

__all__ = ["InitialState", "LatentBlend", "from_latents", "from_noise", "from_picture", "generators_of", "timesteps_from"]


@dataclass(frozen=True)
class LatentBlend:
    """Inpainting by latent blending: after every step, what the mask leaves out gets the original's latents back.

    ``mask`` is (1, 1, height, width) of zeros and ones, ``known`` and ``noise`` are (images, channels, height, width). The
    original's latents carry the noise of the step that comes next, and none after the last: ``levels`` (steps, 2) are the factors
    of both after each step, on the device, as a scheduler looks them up on the host and copies them at every step.
    """

    mask: Tensor
    known: Tensor
    noise: Tensor
    levels: Tensor

    def blend(self, latents: Tensor, index: int) -> Tensor:
        """The latents after the step of that index, blended."""
        signal, noise = self.levels[index].unbind()
        return (1 - self.mask) * (signal * self.known + noise * self.noise) + self.mask * latents


@dataclass(frozen=True)
class InitialState:
    """The first latents (images, channels, height, width), the timesteps that run, and what inpainting keeps."""

    latents: Tensor
    timesteps: Tensor
    generators: list[torch.Generator]
    """Of each picture, as far as they were drawn from: what the scheduler draws follows."""
    repaint: LatentBlend | None = None


def generators_of(seeds: Sequence[int]) -> list[torch.Generator]:
    """A generator for each picture, on the CPU whatever the device, so that a seed gives the same picture everywhere."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def timesteps_from(scheduler: Any, steps: int, strength: float) -> Tensor:
    """The last ``strength`` (in (0, 1]) of a scheduler's timesteps, counted as diffusers does; it is told where it begins.

    Raises:
        RequestError: the strength leaves no step to run.
    """
    running = int(steps * strength)
    if running < 1:
        raise RequestError(f"strength = {strength} of {steps} steps leaves none to run; ask for more steps or strength")
    start = (steps - running) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    timesteps: Tensor = scheduler.timesteps[start:]
    return timesteps


def from_noise(scheduler: Any, shape: Sequence[int], generators: list[torch.Generator], device: torch.device) -> InitialState:
    """Start from nothing but noise. ``shape`` is (channels, height, width)."""
    noise = _draw(shape, generators, device)
    return InitialState(noise * scheduler.init_noise_sigma, scheduler.timesteps, generators)


def from_latents(scheduler: Any, latents: Tensor, generators: list[torch.Generator], device: torch.device) -> InitialState:
    """Start from noise that was drawn elsewhere, of deviation 1: (images, channels, height, width)."""
    noise = latents.to(device, torch.float32)
    return InitialState(noise * scheduler.init_noise_sigma, scheduler.timesteps, generators)


def from_picture(
    scheduler: Any,
    distribution: Tensor,
    mask: Tensor | None,
    timesteps: Tensor,
    strength: float,
    generators: list[torch.Generator],
    channels: int,
) -> InitialState:
    """Start from a picture's latents and noise.

    Args:
        scheduler: with its timesteps set, and told where it begins.
        distribution: what the VAE's encoder makes of the picture (1, 2 * channels, height, width): means, then deviations; or
            (1, channels, height, width) where a picture has one encoding only, for which nothing is drawn.
        mask: (1, 1, height, width), of ones where to repaint; None for the whole picture.
        timesteps: those that run.
        strength: at 1 inpainting starts from noise alone, as in diffusers.
        generators: of each picture.
        channels: of latents.
    """
    mean, *deviations = distribution.split(channels, dim=1)
    shape = mean.shape[1:]
    known = mean.expand(len(generators), *shape)
    for deviation in deviations:
        known = known + deviation * _draw(shape, generators, mean.device)
    noise = _draw(shape, generators, mean.device)
    if mask is not None and deviations:
        # diffusers' pipeline encodes the masked picture too, and draws for it, whether its UNet reads that or not
        _draw(shape, generators, mean.device)
    if mask is not None and strength == 1:
        latents = noise * scheduler.init_noise_sigma
    else:
        latents = scheduler.add_noise(known, noise, timesteps[:1])
    if mask is None:
        return InitialState(latents, timesteps, generators)
    return InitialState(
        latents,
        timesteps,
        generators,
        LatentBlend(mask.to(mean.device), known, noise, _levels(scheduler, timesteps, mean.device)),
    )


def _levels(scheduler: Any, timesteps: Tensor, device: torch.device) -> Tensor:
    """The factors of a picture's latents and of the noise that the scheduler adds after each of its steps: (steps, 2)."""
    one, zero = (torch.full((1,), value, dtype=torch.float32, device=device) for value in (1.0, 0.0))
    begin = getattr(scheduler, "begin_index", None)
    levels = []
    for index, timestep in enumerate(timesteps[1:], 1):
        # Timesteps may come twice with different noise: a scheduler that counts its steps is asked before it has taken any.
        after = copy(scheduler)
        if begin is not None:
            after.set_begin_index(begin + index)
        levels.append(torch.cat([after.add_noise(one, zero, timestep[None]), after.add_noise(zero, one, timestep[None])]))
    return torch.stack([*levels, torch.cat([one, zero])])


def _draw(shape: Sequence[int], generators: list[torch.Generator], device: torch.device) -> Tensor:
    """Standard normal numbers (images, channels, height, width), picture by picture, drawn on the CPU."""
    with postponed("torch._dynamo", "allow_in_graph"):
        from diffusers.utils.torch_utils import randn_tensor

    drawn: Tensor = randn_tensor((len(generators), *shape), generators, device, torch.float32)
    return drawn
