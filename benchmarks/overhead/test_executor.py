"""What the executor takes for a call of 50 steps where engines compute nothing: `python -m pytest benchmarks/overhead`.

A null engine stands in for every other. Needs the embedded model's bundle: `python -m exporter build`.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import DTYPES, Bundle, BundleError, Runner
from engines.bundle.manifest import Segment
from engines.bundle.names import SAMPLE, TEXT
from engines.bundle.shapes import resolve
from engines.null import Null
from runtime import Executor, LoadedBundle, Schedule, find_plan

BUNDLE, STEPS = Path("bundles/emoji-original"), 50


@lru_cache(256)
def _zeros(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Zeros of that shape, made once and in no memory: to fill memory is none of the executor's work."""
    return torch.zeros((), dtype=DTYPES[dtype]).expand(shape)


class _NothingRunner(Runner):
    """Gives out zeros that are there already."""

    def _run_impl(self, inputs: dict[str, torch.Tensor], sizes: dict[str, int]) -> dict[str, torch.Tensor]:
        return {name: _zeros(shape, self.features[name].dtype) for name, shape in self.output_shapes(sizes).items()}


class Nothing(Null):
    def load(self, bundle: Bundle, segment: Segment) -> Runner:
        return _NothingRunner(segment, bundle.manifest.features)


@pytest.mark.parametrize("plan", ["full", "deepcache:3"])
def test_a_call_on_the_null_engine(benchmark: Any, plan: str) -> None:
    try:
        bundle = Bundle.open(BUNDLE)
    except BundleError as error:
        pytest.fail(f"{error}; build it with `python -m exporter build`")
    manifest = bundle.manifest
    network = LoadedBundle.load(bundle, Nothing())
    timesteps = [1000.0 - 20 * index for index in range(STEPS)]
    schedule = Schedule(find_plan(plan), {manifest.variant: manifest}, timesteps)
    height, width = (side // manifest.vae_scale for side in manifest.sizes[0])
    sizes = {"batch": 2, "height": height, "width": width}
    sample, text = (torch.zeros(resolve(manifest.features[name].shape, sizes)) for name in (SAMPLE, TEXT))
    times = [torch.tensor([timestep]) for timestep in timesteps]

    def call() -> None:
        executor = Executor({manifest.variant: network}, schedule)
        for index, timestep in enumerate(times):
            executor.step(index, sample, timestep, text)

    ran = sum(len(schedule.subgraph(step).segments) for step in schedule.all_steps())
    benchmark(call)
    benchmark.extra_info |= {
        "steps": STEPS,
        "segments": ran,
        "us_per_segment": round(1e6 * benchmark.stats.stats.median / ran, 1),
    }
