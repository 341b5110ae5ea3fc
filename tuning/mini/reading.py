"""What pictures show, as figures for the training log: needs the repository's benchmarks/, so it is loaded on use."""

from collections.abc import Sequence

from torch import Tensor

from tuning.mini.data import to_bytes
from tuning.mini.scenes import Asked, Scene, parse

__all__ = ["read_captions", "read_scenes"]


def _read(asked: Sequence[Asked], pictures: Tensor) -> dict[str, float]:
    from tuning.mini.reader_rules import read
    from tuning.mini.reader_score import judge, shares

    return shares([judge(want, read(seen)) for want, seen in zip(asked, to_bytes(pictures), strict=True)])


def read_scenes(scenes: Sequence[Scene], pictures: Tensor) -> dict[str, float]:
    """The share of pictures (n, 3, h, w) in [-1, 1] that show their scene, by attribute and in all."""
    from tuning.mini.reader_score import asked_of

    return _read([asked_of(scene) for scene in scenes], pictures)


def read_captions(captions: Sequence[str], pictures: Tensor) -> dict[str, float]:
    """The share of pictures (n, 3, h, w) in [-1, 1] that show what their caption asks for."""
    return _read([parse(text) for text in captions], pictures)
