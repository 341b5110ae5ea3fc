"""OpenVINO through optimum-intel: in single precision, or as it chooses: bfloat16 where the processor has it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.sd_pipeline import maker
from benchmarks.peers.serve import Call, Made

__all__ = ["export", "load"]


def export(folder: Path, exported: Path, options: dict[str, Any]) -> None:
    """Write a pipeline in OpenVINO's form; the weights stay as they are, which large ones would not by themselves."""
    from optimum.intel import OVStableDiffusionPipeline  # type: ignore[import-not-found]

    made = OVStableDiffusionPipeline.from_pretrained(str(folder), export=True, compile=False, load_in_8bit=False)
    made.save_pretrained(exported)


def load(folder: Path, options: dict[str, Any]) -> Callable[[Call], Made]:
    """A maker of pictures, with the exported files; all is compiled for the size asked for, as its documentation advises."""
    from optimum.intel import OVStableDiffusionPipeline

    config = {"INFERENCE_NUM_THREADS": options["threads"]}
    if precision := options.get("precision"):
        config["INFERENCE_PRECISION_HINT"] = precision
    pipeline = OVStableDiffusionPipeline.from_pretrained(str(folder), export=False, compile=False, ov_config=config)
    pipeline.reshape(options["images"], options["height"], options["width"], num_images_per_prompt=1)
    pipeline.compile()
    return maker(pipeline)
