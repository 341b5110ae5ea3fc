"""This project: a bundle in one of its engines, under whatever plan a call names."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.sd_pipeline import Clock
from benchmarks.peers.serve import Call, Made

__all__ = ["load"]


class _Timed:
    """A runner that notes when its segment ran."""

    def __init__(self, runner: Any, name: str, spans: list[tuple[str, float, float]]) -> None:
        self._runner, self._name, self._spans = runner, name, spans

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, inputs: Any) -> Any:
        """As the runner does."""
        started = time.perf_counter()
        made = self._runner.run(inputs)
        self._spans.append((self._name, started, time.perf_counter()))
        return made


def _watch(engine: Any, spans: list[tuple[str, float, float]]) -> None:
    """The engine's runners note in ``spans`` when they run."""
    load = engine.load
    engine.load = lambda bundle, segment: _Timed(load(bundle, segment), segment.name, spans)


def load(folder: Path, options: dict[str, Any]) -> Callable[[Call], Made]:
    """A maker of pictures with the bundle in a folder."""
    import numpy as np
    import torch

    from benchmarks.gpu.card import engine_named
    from engines import Bundle
    from runtime import Pipeline

    engine, spans = engine_named(options["engine"], torch.device(options["device"])), list[tuple[str, float, float]]()
    if options.get("timeline"):
        _watch(engine, spans)
    pipeline = Pipeline(Bundle.open(folder), engine)
    text, vae = Clock(pipeline._prompts, "features"), Clock(pipeline, "_pixels")

    def make(call: Call) -> Made:
        spans.clear()
        called = time.perf_counter()
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
        return Made(made.latents.float().cpu().numpy(), pictures, sum(text.take()), sum(vae.take()), steps, _since(called, spans))

    return make


def _since(called: float, spans: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    return [(name, start - called, end - called) for name, start, end in spans]
