"""A checkpoint's weights written in half precision as users have them: one .safetensors file, or a folder by diffusers."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tuning.checkpoints.compvis_layout import single_file_state
from tuning.checkpoints.source import Source
from tuning.checkpoints.weights import materialize

__all__ = ["WRITERS", "write_file", "write_folder"]

_PARTS = ("unet", "vae", "text_encoder")


def write_file(source: Source, folder: Path) -> Path:
    """Write ``model.safetensors`` in CompVis' layout, with a text encoder as in Stable Diffusion 1.x; returns its path."""
    state = single_file_state({part: _part(source, part) for part in _PARTS})
    path = folder / "model.safetensors"
    save_file({name: weight.contiguous() for name, weight in state.items()}, path)
    return path


def write_folder(source: Source, folder: Path) -> Path:
    """Write ``model``, a part at a time, with ``save_pretrained``; returns its path."""
    path = folder / "model"
    for part in _PARTS:
        _part(source, part).save_pretrained(path / part)
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(source.folder / part, path / part)
    return path


def _part(source: Source, part: str) -> Any:
    return materialize(source.skeleton(part), source.weights(part), torch.float16)


WRITERS: dict[str, Callable[[Source, Path], Path]] = {"file": write_file, "folder": write_folder}
"""By the word before ``of`` in a source's name."""
