"""Diffusers compiled by stable-fast (https://github.com/chengzeyi/stable-fast), with CUDA graphs, as its README does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.diffusers_eager import pipeline_of
from benchmarks.peers.sd_pipeline import maker
from benchmarks.peers.serve import Call, Made

__all__ = ["load"]


def load(folder: Path, options: dict[str, Any]) -> Callable[[Call], Made]:
    """A maker of pictures; the first picture compiles."""
    from importlib.util import find_spec

    from sfast.compilers.diffusion_pipeline_compiler import CompilationConfig, compile  # type: ignore[import-not-found]

    config = CompilationConfig.Default()
    config.enable_xformers = find_spec("xformers") is not None
    config.enable_triton = find_spec("triton") is not None
    config.enable_cuda_graph = True
    return maker(compile(pipeline_of(folder, options), config), options["device"])
