"""How close numbers are to what they should be."""

import math

import torch
from torch import Tensor

__all__ = ["cosine", "psnr", "relative_error"]


def relative_error(made: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the reference's maximum; infinite where a number is not finite."""
    difference, largest = (made.float().cpu() - reference).abs().max(), reference.abs().max()
    error = float(difference / largest) if largest > 0 else float(difference)
    return error if math.isfinite(error) else math.inf


def cosine(made: Tensor, reference: Tensor) -> float:
    """Cosine of the angle between the two, all numbers of each taken as one vector; computed in double precision.

    It is -1, the farthest, where a number is not finite, and 1 where both are all zeros.
    """
    one, other = made.double().cpu().flatten(), reference.double().flatten()
    if not one.any() and not other.any():
        return 1.0
    angle = float(torch.dot(one, other) / (one.norm() * other.norm()))
    return angle if math.isfinite(angle) else -1.0


def psnr(made: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels; the peak is the reference's range. Infinite where they are equal.

    It is minus infinity where a number is not finite.
    """
    noise = (made.double().cpu() - reference.double()).square().mean()
    ratio = float(20 * torch.log10((reference.max() - reference.min()).double()) - 10 * torch.log10(noise))
    return -math.inf if math.isnan(ratio) else ratio
