"""OpenVINO through optimum-intel: in single precision, or as it chooses: bfloat16 where the processor has it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.sd_pipeline import maker
from benchmarks.peers.serve import Call, Made

__all__ = ["load"]


def load(folder: Path, options: dict[str, Any]) -> Callable[[Call], Made]:
    """A maker of pictures; the UNet is compiled for the size asked for, as its documentation advises."""
    from optimum.intel import OVStableDiffusionPipeline  # type: ignore[import-not-found]

    exported = Path(options["work"]) / "optimum-openvino"
    if not (exported / "model_index.json").is_file():
        made = OVStableDiffusionPipeline.from_pretrained(folder, export=True, compile=False, load_in_8bit=False)
        made.save_pretrained(exported)
    config = {"INFERENCE_NUM_THREADS": options["threads"]}
    if precision := options.get("precision"):
        config["INFERENCE_PRECISION_HINT"] = precision
    pipeline = OVStableDiffusionPipeline.from_pretrained(exported, compile=False, ov_config=config)
    pipeline.reshape(options["images"], options["height"], options["width"], num_images_per_prompt=1)
    pipeline.compile()
    return maker(pipeline)
