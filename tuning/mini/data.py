"""Training data: scenes, captions and pictures as a function of a seed, nothing stored; `fetch` brings the emoji instead."""

import random

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tuning.mini.render import render
from tuning.mini.scenes import Scene, caption, sample_scene

__all__ = ["batch", "to_bytes", "to_tensor"]


def to_tensor(pictures: npt.NDArray[np.uint8]) -> Tensor:
    """(n, h, w, 3) bytes -> (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_bytes(pictures: Tensor) -> npt.NDArray[np.uint8]:
    """(n, 3, h, w) in [-1, 1] -> (n, h, w, 3) bytes."""
    numbers: npt.NDArray[np.uint8] = ((pictures + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return numbers


def batch(count: int, key: str, *, held: bool = False) -> tuple[list[Scene], list[str], Tensor]:
    """`count` scenes, one caption of each, and their pictures (count, 3, 64, 64) in [-1, 1]; all follow from `key`."""
    rng = random.Random(key)
    scenes = [sample_scene(rng, held=held) for _ in range(count)]
    captions = [caption(scene, rng) for scene in scenes]
    pictures = render(scenes, np.random.default_rng(rng.getrandbits(64)))
    return scenes, captions, to_tensor(pictures)


if __name__ == "__main__":
    from engines.support.cli import run_command
    from tuning.mini.emoji_fetch import main

    run_command(main)
