"""Shared by adapters of Stable Diffusion pipelines: a picture from one, with the time of each of its parts."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.peers.serve import Call, Made

__all__ = ["Clock", "maker"]


class Clock:
    """Seconds of each call of a method, which it stands in for: on the host, or with ``cuda`` by events, read at the end."""

    def __init__(self, owner: Any, method: str, cuda: bool = False) -> None:
        self._call, self._cuda, self._spans = getattr(owner, method), cuda, list[tuple[Any, Any]]()
        self.given: Any = None
        setattr(owner, method, self)

    def __call__(self, *given: Any, **others: Any) -> Any:
        self.given = given[0] if given else None
        start = self._now()
        result = self._call(*given, **others)
        self._spans.append((start, self._now()))
        return result

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> list[float]:
        """Seconds of the calls since the last taking."""
        if self._cuda:
            import torch

            torch.cuda.synchronize()
        spans, self._spans = self._spans, []
        return [a.elapsed_time(b) / 1000 if self._cuda else b - a for a, b in spans]


def maker(pipeline: Any, device: str = "cpu", kind: Callable[[int], str] = lambda step: "key") -> Callable[[Call], Made]:
    """Makes pictures with a pipeline; ``kind`` names the kind of a step by its number."""
    import torch

    pipeline.set_progress_bar_config(disable=True)
    text, unet = (Clock(part, "forward", device == "cuda") for part in (pipeline.text_encoder, pipeline.unet))
    vae = Clock(pipeline.vae, "decode", device == "cuda")

    def make(call: Call) -> Made:
        generators = [torch.Generator().manual_seed(call.seed + index) for index in range(call.images)]
        pictures = pipeline(
            call.prompt,
            num_inference_steps=call.steps,
            guidance_scale=call.guidance,
            height=call.height,
            width=call.width,
            num_images_per_prompt=call.images,
            generator=generators,
            output_type="np",
        ).images
        latents = np.asarray(torch.as_tensor(vae.given).float().cpu()) * pipeline.vae.config.scaling_factor
        seconds = unet.take()
        steps = [(kind(index), value) for index, value in enumerate(seconds)]
        return Made(latents, np.round(pictures * 255).astype(np.uint8), sum(text.take()), sum(vae.take()), steps)

    return make
