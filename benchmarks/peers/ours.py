"""This project: a bundle in one of its engines, under whatever plan a call names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.sd_pipeline import Clock
from benchmarks.peers.serve import Call, Made

__all__ = ["load"]


def load(folder: Path, options: dict[str, Any]) -> Callable[[Call], Made]:
    """A maker of pictures with the bundle in a folder."""
    import numpy as np
    import torch

    from benchmarks.gpu.card import engine_named
    from engines import Bundle
    from runtime import Pipeline

    pipeline = Pipeline(Bundle.open(folder), engine_named(options["engine"], torch.device(options["device"])))
    text, vae = Clock(pipeline._prompts, "features"), Clock(pipeline, "_pixels")

    def make(call: Call) -> Made:
        made = pipeline.generate(
            call.prompt,
            steps=call.steps,
            guidance_scale=call.guidance,
            seed=call.seed,
            height=call.height,
            width=call.width,
            num_images=call.images,
            plan=call.plan,
        )
        steps = [(record.kind, record.seconds) for record in made.steps]
        pictures = np.stack([np.asarray(image.convert("RGB")) for image in made.images])
        return Made(made.latents.float().cpu().numpy(), pictures, sum(text.take()), sum(vae.take()), steps)

    return make
