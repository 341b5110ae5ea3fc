"""Optimum's pipeline on ONNX Runtime: the whole UNet as one ONNX file, exported once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.sd_pipeline import maker
from benchmarks.peers.serve import Call, Made

__all__ = ["export", "load"]


def export(folder: Path, exported: Path, options: dict[str, Any]) -> None:
    """Write a pipeline as ONNX files."""
    from optimum.onnxruntime import ORTStableDiffusionPipeline  # type: ignore[import-not-found]

    # A path that is no string is taken for a model, whose library cannot be told.
    ORTStableDiffusionPipeline.from_pretrained(str(folder), export=True).save_pretrained(exported)


def load(folder: Path, options: dict[str, Any]) -> Callable[[Call], Made]:
    """A maker of pictures, with the exported files."""
    import onnxruntime
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options["threads"]
    return maker(ORTStableDiffusionPipeline.from_pretrained(str(folder), session_options=settings))
