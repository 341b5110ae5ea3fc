"""Emoji as pictures: rendered once as textures, then drawn on a device at any place, size and background."""

import os
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from tuning.emoji.concepts import BACKGROUNDS, PLACES, SIZES, STYLES, Drawing, Icon, load_icons, split
from tuning.training.extras import need

__all__ = ["SIZE", "Textures", "draw", "random_drawing", "render"]

SIZE = 128
"""Side of the pictures, in pixels."""
_SHIFT = 0.24
"""How far a small drawing is moved to a side, as a share of the picture's."""


def _texture(svg: str) -> npt.NDArray[np.uint8]:
    import resvg_py

    data = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)
    picture = Image.open(BytesIO(bytes(data))).convert("RGBA")
    if picture.size != (SIZE, SIZE):  # not square: centred
        square = Image.new("RGBA", (max(picture.size),) * 2)
        width, height = ((max(picture.size) - side) // 2 for side in picture.size)
        square.paste(picture, (width, height))
        picture = square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def render(icons: Sequence[Icon], processes: int = 1) -> Tensor:
    """SVG -> textures (n, 4, SIZE, SIZE), bytes of RGBA."""
    svgs = [icon.svg for icon in icons]
    if processes == 1:
        made = [_texture(svg) for svg in svgs]
    else:
        with ProcessPoolExecutor(processes) as pool:
            made = list(pool.map(_texture, svgs, chunksize=32))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()


def random_drawing(icon: Icon, rng: random.Random) -> Drawing:
    """How an icon is shown: mostly as large as the picture, in its middle, on white."""
    background = "white" if rng.random() < 0.6 else rng.choice([name for name in BACKGROUNDS if name != "white"])
    size = rng.choices(list(SIZES), (2, 7, 1))[0]
    place = rng.choice(list(PLACES)) if size == "small" else ""
    return Drawing(icon.concept, icon.style, background, size, place)


def draw(textures: Tensor, drawings: Sequence[Drawing], rng: random.Random | None = None) -> Tensor:
    """Textures (n, 4, SIZE, SIZE) of bytes and how each is shown -> pictures (n, 3, SIZE, SIZE) in [-1, 1].

    With a generator sizes, places and backgrounds vary a little.
    """

    def jitter(width: float) -> float:
        return rng.uniform(-width, width) if rng else 0.0

    device = textures.device
    scale = torch.tensor([SIZES[d.size] * (1 + jitter(0.06)) for d in drawings], device=device)
    shift = torch.tensor(
        [[2 * _SHIFT * side + jitter(0.05) for side in PLACES[d.place]] for d in drawings], device=device
    )  # in halves of the picture's side
    ground = torch.tensor([[v / 255 for v in BACKGROUNDS[d.background]] for d in drawings], device=device)
    source = textures.float() / 255
    alpha = source[:, 3:]
    theta = torch.zeros(len(drawings), 2, 3, device=device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = -shift / scale[:, None]
    # Twice as fine, then averaged: small drawings keep smooth edges.
    grid = functional.affine_grid(theta, [len(drawings), 4, 2 * SIZE, 2 * SIZE], align_corners=False)
    drawn = functional.grid_sample(torch.cat([source[:, :3] * alpha, alpha], 1), grid, align_corners=False)
    drawn = functional.avg_pool2d(drawn, 2)
    return (drawn[:, :3] + (1 - drawn[:, 3:]) * ground[:, :, None, None]) * 2 - 1


class Textures:
    """The pairs for training and those held back, their textures, and the classes that they have.

    Raises TuningError when a set is missing or resvg-py is.
    """

    def __init__(self, icons: Path, device: torch.device, limit: int | None = None) -> None:
        """`limit`: only so many concepts, for trials."""
        need("resvg_py", "drawing emoji")
        every = load_icons(icons)
        self.concepts = sorted({icon.concept for icon in every})[:limit]
        kept = set(self.concepts)
        self.train, self.held = split(icon for icon in every if icon.concept in kept)
        self.device = device
        self._textures = render(self.train + self.held, os.cpu_count() or 1).to(device)

    def draw(self, rows: Sequence[int], rng: random.Random) -> tuple[Tensor, list[Drawing]]:
        """Pictures (n, 3, SIZE, SIZE) of training pairs, each drawn in some way."""
        drawings = [random_drawing(self.train[row], rng) for row in rows]
        return draw(self.textures(rows), drawings, rng), drawings

    def textures(self, rows: Sequence[int]) -> Tensor:
        """Textures (n, 4, SIZE, SIZE) of bytes of training pairs."""
        return self._textures[torch.tensor(rows, device=self.device)]

    def batch(self, count: int, rng: random.Random) -> Tensor:
        """As `draw`, of pairs chosen at random."""
        return self.draw([rng.randrange(len(self.train)) for _ in range(count)], rng)[0]

    def held_back(self, count: int | None = None) -> Tensor:
        """Pictures of pairs held back as they are, on white."""
        start = len(self.train)
        return self.plain(range(start, start + len(self.held[:count])))

    def plain(self, rows: Sequence[int]) -> Tensor:
        """Pictures as they are, on white; rows count on from the training pairs to those held back."""
        icons = [*self.train, *self.held]
        drawings = [Drawing(icons[row].concept, icons[row].style) for row in rows]
        return draw(self._textures[torch.tensor(list(rows), device=self.device)], drawings)

    def labels(self, icons: Sequence[Icon]) -> tuple[Tensor, Tensor]:
        """Numbers (n,) of concepts and of styles."""
        number = {concept: i for i, concept in enumerate(self.concepts)}
        concepts = torch.tensor([number[icon.concept] for icon in icons], device=self.device)
        return concepts, torch.tensor([STYLES.index(icon.style) for icon in icons], device=self.device)
