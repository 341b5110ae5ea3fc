"""How close numbers are to what they should be."""

import torch
from torch import Tensor

__all__ = ["cosine", "psnr", "relative_error"]


def relative_error(made: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the reference's maximum."""
    return float((made.float().cpu() - reference).abs().max() / reference.abs().max())


def cosine(made: Tensor, reference: Tensor) -> float:
    """Cosine of the angle between the two, all numbers of each taken as one vector; computed in double precision."""
    one, other = made.double().cpu().flatten(), reference.double().flatten()
    return float(torch.dot(one, other) / (one.norm() * other.norm()))


def psnr(made: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels; the peak is the reference's range. Infinite where they are equal."""
    noise = (made.double().cpu() - reference.double()).square().mean()
    return float(20 * torch.log10((reference.max() - reference.min()).double()) - 10 * torch.log10(noise))
