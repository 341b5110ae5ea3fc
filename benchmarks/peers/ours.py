"""This project: a bundle in one of its engines, under whatever plan a call names."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.serve import Call, Made

__all__ = ["load"]


class _Clock:
    """Seconds of a method's calls, which end when their results are on the host."""

    def __init__(self, owner: Any, method: str) -> None:
        self._call, self._seconds = getattr(owner, method), 0.0
        setattr(owner, method, self)

    def __call__(self, *given: Any) -> Any:
        started = time.perf_counter()
        result = self._call(*given)
        self._seconds += time.perf_counter() - started
        return result

    def take(self) -> float:
        """Seconds since the last taking."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def load(folder: Path, options: dict[str, Any]) -> Callable[[Call], Made]:
    """A maker of pictures with the bundle in a folder."""
    import numpy as np
    import torch

    from benchmarks.gpu.card import engine_named
    from engines import Bundle
    from runtime import Pipeline

    pipeline = Pipeline(Bundle.open(folder), engine_named(options["engine"], torch.device(options["device"])))
    text, vae = _Clock(pipeline._prompts, "features"), _Clock(pipeline, "_pixels")

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
        return Made(made.latents.float().cpu().numpy(), pictures, text.take(), vae.take(), steps)

    return make
