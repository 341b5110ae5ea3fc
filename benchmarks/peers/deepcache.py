"""Diffusers with DeepCache (Ma et al., arXiv 2312.00858): the shallowest branch, as the plan deepcache:3."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.diffusers_eager import pipeline_of
from benchmarks.peers.sd_pipeline import maker
from benchmarks.peers.serve import Call, Made

__all__ = ["EVERY", "load"]

EVERY = 3


def load(folder: Path, options: dict[str, Any]) -> Callable[[Call], Made]:
    """A maker of pictures."""
    from DeepCache import DeepCacheSDHelper

    pipeline = pipeline_of(folder, options)
    helper = DeepCacheSDHelper(pipe=pipeline)
    helper.set_params(cache_interval=EVERY, cache_branch_id=0)
    helper.enable()
    return maker(pipeline, options["device"], lambda step: "inherit" if step % EVERY else "key")
