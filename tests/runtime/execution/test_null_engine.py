"""Schedules on the null engine: which segments of the mini model's UNet run at which step. No weights, no arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from engines import Bundle, Manifest, make_engine
from engines.null import Null
from runtime import Executor, LoadedBundle, Schedule, find_plan
from runtime.plans.checks import check_runs
from tests.support.reference import MINI
from tests.support.unets import manifest_of

ALL = ("stem", "down.0", "down.0.sampler", "down.1", "down.2", "down.3", "mid",
       "up.0", "up.1", "up.2", "up.3", "up.3.layer.2", "head")  # fmt: skip
BLOCK = ("stem", "down.0", "up.3", "up.3.layer.2", "head")
DEEPCACHE = ("stem", "up.3.layer.2", "head")
SCHEDULES: dict[str, list[tuple[str, ...]]] = {
    "full": [ALL] * 7,
    "block:2": [ALL, BLOCK, ALL, BLOCK, ALL, BLOCK, ALL],
    "block:3": [ALL, BLOCK, BLOCK, ALL, BLOCK, BLOCK, ALL],
    "block:100": [ALL, *[BLOCK] * 6],
    "deepcache:1": [ALL] * 7,
    "deepcache:2": [ALL, DEEPCACHE, ALL, DEEPCACHE, ALL, DEEPCACHE, ALL],
    "deepcache:3": [ALL, DEEPCACHE, DEEPCACHE, ALL, DEEPCACHE, DEEPCACHE, ALL],
}


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(MINI / "unet"))
    return manifest_of(unet)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_segments_that_run_at_each_step(manifest: Manifest, name: str) -> None:
    engine = make_engine("null")
    assert isinstance(engine, Null)
    network = LoadedBundle.load(Bundle(Path("nowhere"), manifest), engine)
    schedule = Schedule(find_plan(name), {"original": manifest}, [1000.0 - index for index in range(7)])
    check_runs(schedule)
    executor = Executor({"original": network}, schedule)
    sample, text = torch.zeros(2, 4, 8, 16), torch.zeros(manifest_shape(manifest, "text_encoder", 2))
    for index, expected in enumerate(SCHEDULES[name]):
        engine.calls.clear()
        prediction, record = executor.step(index, sample, torch.tensor([1000.0 - index]), text)
        assert tuple(engine.calls) == record.ran == expected
        assert prediction.shape == sample.shape
        assert record.kind == ("key" if expected == ALL else "inherit")


def manifest_shape(manifest: Manifest, name: str, rows: int) -> list[int]:
    return [rows, *(int(dim) for dim in manifest.features[name].shape[1:])]


def test_only_the_segments_wanted_are_run_for_the_text_and_the_picture(mini_bundle: Bundle) -> None:
    engine = Null()
    network = LoadedBundle.load(mini_bundle, engine)
    text = network.compute("text_encoder", {"tokens": torch.zeros(3, 32, dtype=torch.int64)})
    pixels = network.compute("vae_decoder", {"latents": torch.zeros(2, 4, 8, 16)})
    assert engine.calls == ["text_encoder", "vae_decoder"]
    assert text.shape == (3, 32, 128)
    assert pixels.shape == (2, 3, 64, 128)
