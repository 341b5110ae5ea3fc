"""The pictures that the reader trains on: emoji at its size, turned, stretched, tinted, covered, noisy and blurred.

Sets draw the same concept in other colours, proportions and directions; a reader that has seen four of them is to read a fifth.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from tuning.emoji.concepts import BACKGROUNDS
from tuning.emoji.pictures import SIZE

__all__ = ["VIEW", "mixed", "views"]

VIEW = SIZE // 2
"""Side of the pictures that the reader looks at, in pixels."""
_TURN, _STRETCH, _SHIFT = 0.17, 0.12, 0.12  # radians; shares of the side
_SMALL = 0.2  # so many are drawn at half size
_WHITE = 0.5
_LUMA = (0.299, 0.587, 0.114)


def views(textures: Tensor, *, own_colours: bool = False) -> Tensor:
    """Textures (n, 4, SIZE, SIZE) of bytes -> pictures (n, 3, VIEW, VIEW) in [-1, 1], each augmented in its own way.

    With `own_colours` they are placed and turned, but keep the colours and the sharpness that a style is known by.
    """
    source = textures.float() / 255
    colours, alpha = source[:, :3], source[:, 3:]
    colours = colours if own_colours else _tinted(colours)
    n, device = len(source), source.device
    grid = functional.affine_grid(_placements(n, device), [n, 4, SIZE, SIZE], align_corners=False)
    drawn = functional.avg_pool2d(functional.grid_sample(torch.cat([colours * alpha, alpha], 1), grid, align_corners=False), 2)
    pictures = drawn[:, :3] + (1 - drawn[:, 3:]) * _grounds(n, device)[:, :, None, None]
    return pictures * 2 - 1 if own_colours else _spoilt(pictures * 2 - 1)


def _uniform(n: int, low: float, high: float, device: torch.device) -> Tensor:
    return torch.empty(n, device=device).uniform_(low, high)


def _placements(n: int, device: torch.device) -> Tensor:
    """Affine maps (n, 2, 3) from places in the picture to places in the texture."""
    small = torch.rand(n, device=device) < _SMALL
    scale = torch.where(small, _uniform(n, 0.45, 0.6, device), _uniform(n, 0.8, 1.12, device))
    stretch = _uniform(n, -_STRETCH, _STRETCH, device).exp()
    mirror = torch.where(torch.rand(n, device=device) < 0.5, -1.0, 1.0)
    angle = _TURN * torch.randn(n, device=device).clamp_(-2, 2)
    wide, high = mirror / (scale * stretch), stretch / scale
    reach = torch.where(small, 0.4, _SHIFT)
    shift = (2 * torch.rand(2, n, device=device) - 1) * reach
    cos, sin = angle.cos(), angle.sin()
    rows = (wide * cos, wide * sin, -wide * shift[0], -high * sin, high * cos, -high * shift[1])
    return torch.stack(rows, 1).view(n, 2, 3)


def _tinted(colours: Tensor) -> Tensor:
    """Colours (n, 3, h, w) in [0, 1] with hues turned a little, more or less colourful, lighter or darker."""
    n, device = len(colours), colours.device
    luma = torch.tensor(_LUMA, device=device)[:, None, None].mul(colours).sum(1, keepdim=True)
    grey = torch.rand(n, device=device) < 0.1
    saturation = torch.where(grey, 0.0, _uniform(n, 0.5, 1.4, device))
    contrast, light = _uniform(n, 0.75, 1.25, device), _uniform(n, -0.12, 0.12, device)
    angle = 0.25 * torch.randn(n, device=device).clamp_(-2, 2)
    chroma = torch.einsum("nij,njhw->nihw", _hue_turns(angle), colours - luma)
    grown = luma + chroma * saturation[:, None, None, None]
    return ((grown - 0.5) * contrast[:, None, None, None] + 0.5 + light[:, None, None, None]).clamp_(0, 1)


def _hue_turns(angle: Tensor) -> Tensor:
    """Rotations (n, 3, 3) of RGB round its grey axis, by Rodrigues' formula."""
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None] / math.sqrt(3)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=angle.device)
    return cos * torch.eye(3, device=angle.device) + sin * cross + (1 - cos) / 3


def _grounds(n: int, device: torch.device) -> Tensor:
    """Background colours (n, 3) in [0, 1]: white, or near one of those that captions name."""
    named = torch.tensor(list(BACKGROUNDS.values()), device=device) / 255
    near = (named[torch.randint(len(named), (n,), device=device)] + 0.06 * torch.randn(n, 3, device=device)).clamp_(0, 1)
    return torch.where(torch.rand(n, 1, device=device) < _WHITE, torch.ones(n, 3, device=device), near)


def _spoilt(pictures: Tensor) -> Tensor:
    """Pictures with noise, blurred as an autoencoder blurs, and with a patch covered, each now and then."""
    n, device = len(pictures), pictures.device
    soft = functional.avg_pool2d(functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    pictures = pictures.lerp(soft, _uniform(n, -0.5, 1, device).clamp_(0, 1)[:, None, None, None])
    strength = 0.1 * _uniform(n, -0.5, 1, device).clamp_(0, 1)[:, None, None, None]
    pictures = pictures + strength * torch.randn_like(pictures)
    side = torch.randint(VIEW // 8, 3 * VIEW // 8, (n, 1), device=device)
    corner = torch.randint(0, 3 * VIEW // 4, (2, n, 1), device=device)
    at = torch.arange(VIEW, device=device)
    down, across = ((at >= c) & (at < c + side) for c in corner)
    covered = down[:, :, None] & across[:, None, :] & (torch.rand(n, 1, 1, device=device) < 0.3)
    return torch.where(covered[:, None], torch.zeros((), device=device), pictures)


def mixed(pictures: Tensor) -> tuple[Tensor, Tensor, float]:
    """Pictures mixed with each other (Zhang et al., arXiv 1710.09412): with which (n,), and the share of the first of two."""
    share = float(torch.distributions.Beta(0.4, 0.4).sample())
    share = max(share, 1 - share)
    other = torch.randperm(len(pictures), device=pictures.device)
    return pictures.lerp(pictures[other], 1 - share), other, share
