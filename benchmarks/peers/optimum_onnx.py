"""Optimum's pipeline on ONNX Runtime: the whole UNet as one ONNX file, exported once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.sd_pipeline import maker
from benchmarks.peers.serve import Call, Made

__all__ = ["load"]


def load(folder: Path, options: dict[str, Any]) -> Callable[[Call], Made]:
    """A maker of pictures."""
    from optimum.onnxruntime import ORTStableDiffusionPipeline  # type: ignore[import-not-found]

    exported = Path(options["work"]) / "optimum-onnx"
    if not (exported / "model_index.json").is_file():
        ORTStableDiffusionPipeline.from_pretrained(folder, export=True).save_pretrained(exported)
    return maker(ORTStableDiffusionPipeline.from_pretrained(exported))
