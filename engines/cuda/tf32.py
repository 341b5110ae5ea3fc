"""Single precision that is single precision: on NVIDIA GPUs PyTorch rounds the factors of convolutions to 10 bits (TF32)."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["without_tf32"]

_LOCK = threading.Lock()
_inside = 0
_before: list[str] = []
"""The settings that the first thread to enter found; the last to leave puts them back."""


@contextmanager
def without_tf32() -> Iterator[None]:
    """Inside it, convolutions and matrix products of float32 keep all bits.

    The choice is the process's own: while one thread is inside, it holds for the others too, which costs them time and no bits.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _inside  # noqa: PLW0603 - it counts for the whole process, as what it guards does
    with _LOCK:
        if not _inside:
            _before[:] = [backend.fp32_precision for backend in _backends()]
            for backend in _backends():
                backend.fp32_precision = "ieee"
        _inside += 1


def _leave() -> None:
    global _inside  # noqa: PLW0603
    with _LOCK:
        _inside -= 1
        if not _inside:
            for backend, precision in zip(_backends(), _before, strict=True):
                backend.fp32_precision = precision


def _backends() -> tuple[Any, ...]:
    cudnn: Any = torch.backends.cudnn  # its attributes are made when it is imported, which no type checker sees
    return cudnn.conv, torch.backends.cuda.matmul
