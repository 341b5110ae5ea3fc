"""Diffusers with its UNet compiled by torch.compile: with CUDA graphs and channels last on a GPU."""

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
    mode = "max-autotune" if cuda else "default"
    pipeline.unet.forward = torch.compile(pipeline.unet.forward, mode=mode, fullgraph=True, dynamic=False)
    return maker(pipeline, options["device"])
