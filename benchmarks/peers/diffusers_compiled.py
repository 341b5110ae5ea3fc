"""Diffusers with its UNet compiled by torch.compile: with CUDA graphs and channels last on a GPU, with frozen weights on a CPU.

Weights that are not frozen are laid out anew for their kernels at every call, which on a CPU takes longer than compiling saves.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.diffusers_eager import pipeline_of
from benchmarks.peers.sd_pipeline import maker
from benchmarks.peers.serve import Call, Made

__all__ = ["load"]


def load(folder: Path, options: dict[str, Any]) -> Callable[[Call], Made]:
    """A maker of pictures; the first picture compiles."""
    import torch

    cuda = options["device"] == "cuda"
    pipeline = pipeline_of(folder, options | ({"memory_format": "channels_last"} if cuda else {}))
    how: dict[str, Any] = {"mode": "max-autotune"} if cuda else {"options": {"freezing": True}}
    pipeline.unet.forward = torch.compile(pipeline.unet.forward, fullgraph=True, dynamic=False, **how)
    return maker(pipeline, options["device"])
