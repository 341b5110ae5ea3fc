"""Diffusers' own pipeline, as it is or channels last."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.sd_pipeline import maker
from benchmarks.peers.serve import Call, Made

__all__ = ["load", "pipeline_of"]


def pipeline_of(folder: Path, options: dict[str, Any]) -> Any:
    """The pipeline in a folder, on the device and in the precision asked for."""
    import torch
    from diffusers import StableDiffusionPipeline

    dtype = {"fp32": torch.float32, "fp16": torch.float16}[options["precision_of_weights"]]
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True).to(options["device"])
    if options.get("memory_format") == "channels_last":
        for part in (pipeline.unet, pipeline.vae):
            part.to(memory_format=torch.channels_last)
    return pipeline


def load(folder: Path, options: dict[str, Any]) -> Callable[[Call], Made]:
    """A maker of pictures."""
    return maker(pipeline_of(folder, options), options["device"])
