"""Whole calls with recorded steps: pictures, and a UNet in a loop that is not ours; and how steps are timed on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engines import Bundle
from engines.torch_program import Torch
from runtime import Pipeline, UNet
from runtime import diffusers_unet as drop_in_module
from runtime.execution.device_events import Timer
from runtime.execution.graph_cache import CudaGraphCache
from tests.support.recording import FakeRecorder
from tests.support.reference import reference_scheduler
from tests.support.unets import relative_error

pytestmark = pytest.mark.shared_pieces

PROMPT = "a red star on a blue background"


class RecordedTorch(Torch):
    """The torch engine on the CPU, with the stand-in for CUDA graphs."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.fake = FakeRecorder()

    def recorder(self) -> FakeRecorder:
        return self.fake


@pytest.fixture(scope="module")
def pipelines(torch_bundle: Bundle) -> tuple[Pipeline, Pipeline, FakeRecorder]:
    """One that records, and one that does not."""
    engine = RecordedTorch()
    return Pipeline(torch_bundle, engine), Pipeline(torch_bundle, Torch("cpu")), engine.fake


@pytest.mark.slow
def test_an_engine_that_records_gives_its_pipeline_graphs(pipelines: Any) -> None:
    recording, plain, _ = pipelines
    assert isinstance(recording.graphs, CudaGraphCache)
    assert plain.graphs is None


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_pictures(pipelines: Any, guidance: float) -> None:
    recording, plain, fake = pipelines
    for seed in range(2):
        options = {"steps": 4, "guidance_scale": guidance, "seed": seed, "plan": "block:2", "scheduler": "pndm"}
        made, expected = recording.generate(PROMPT, **options), plain.generate(PROMPT, **options)
        assert relative_error(made.latents, expected.latents) < 1e-5
        assert made.steps == expected.steps
        assert all(record.seconds > 0 for record in made.steps)
    assert fake.replayed > fake.recorded


def test_a_call_that_fails_leaves_the_graphs_to_the_next(pipelines: Any) -> None:
    recording, _, fake = pipelines

    def stop(record: Any, latents: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        recording.generate(PROMPT, steps=4, callback=stop)
    before = fake.replayed
    recording.generate(PROMPT, steps=2)
    assert fake.replayed > before
    del caught  # it held on to the call until here


def test_a_loop_of_ones_own_that_breaks_off_and_begins_anew(pipelines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recording, plain, fake = pipelines
    latents, text = torch.randn(2, 4, 8, 8), plain.encode(["", PROMPT])
    predictions = []
    for pipeline in (recording, plain):
        monkeypatch.setattr(drop_in_module, "load", lambda *given, pipeline=pipeline: pipeline)
        unet, found = UNet(plan="deepcache:2"), []
        for stop in (3, 6):
            noise = reference_scheduler("ddim", 6)
            found += [unet(latents, timestep, text, return_dict=False)[0] for timestep in noise.timesteps[:stop]]
        predictions.append(found)
    assert fake.replayed
    for made, expected in zip(*predictions, strict=True):
        assert relative_error(made, expected) < 1e-5


class FakeEvent:
    """A CUDA event on a stream whose clock ticks by a second with every event, and of which the host knows when it waits."""

    now = 0.0
    waited = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        assert stream == "stream"
        FakeEvent.now += 1000
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        FakeEvent.waited += 1

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at - self.at


def test_a_timer_on_a_gpu_waits_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    timer = Timer(torch.device("cuda"))
    timer.stop()
    assert FakeEvent.waited == 0
    assert timer.seconds == timer.seconds == 1.0
    assert FakeEvent.waited == 1
