"""The emoji on a device: textures rendered once, from which batches are drawn in random ways."""

import os
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tuning.emoji.concepts import STYLES, Drawing, Icon, load_icons, split
from tuning.emoji.pictures import draw, random_drawing, render
from tuning.training.extras import need

__all__ = ["Textures"]


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
