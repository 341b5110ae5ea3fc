"""Whole calls on a real GPU: recorded steps, and drills.

Drills provoke what may go wrong: threads at once, captures that fail, no memory left, more kinds of step than recordings are
kept. `make gpu-check` runs them in a stage of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from engines import Bundle, EngineError, make_engine
from engines.cuda.graphs import CannotRecord, CudaRecorder, Recording
from engines.errors import EngineMemoryError
from engines.torch_program import Torch
from runtime import Pipeline
from runtime.execution.graph_cache import LIMIT, CudaGraphCache
from tests.conftest import build_shared
from tests.support.sources import save_source
from tests.support.unets import relative_error

pytestmark = pytest.mark.gpu
drill = pytest.mark.drill
PROMPT = "a red star on a blue background"
PLANS = ("full", "deepcache:3", "adaptive:0.2")
STEPS = 6
# Sums in another order, over six steps.
CLOSE = {"fp32": 1e-3, "fp16": 5e-2}
SIZES = tuple((height, width) for height in range(16, 80, 16) for width in range(16, 96, 16))
"""In pixels: with a plan of two kinds of step, forty kinds."""


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def torch_bundle(request: Any, tmp_path_factory: pytest.TempPathFactory, bundles: Any) -> Bundle:
    source = save_source(tmp_path_factory.mktemp("source") / "tiny")
    wanted = {"source": str(source), "plans": PLANS, "precision": request.param, "force": True, "max_images": 1}
    return build_shared(bundles, f"gpu-tiny-{request.param}", engines=("torch",), **wanted)


@pytest.fixture(scope="module")
def rtx_bundle(torch_bundle: Bundle, bundles: Any) -> Bundle:
    """The same with TensorRT-RTX's engines."""
    pytest.importorskip("tensorrt_rtx")
    manifest = torch_bundle.manifest
    wanted = {"source": manifest.source, "plans": PLANS, "precision": manifest.precision, "force": True, "max_images": 1}
    try:
        return build_shared(bundles, f"gpu-tiny-rtx-{manifest.precision}", engines=("torch", "tensorrt-rtx"), **wanted)
    except EngineError as error:
        pytest.skip(f"TensorRT-RTX builds nothing for this card: {error}")


def latents(pipeline: Pipeline, plan: str, seed: int = 1) -> torch.Tensor:
    return pipeline.generate(PROMPT, steps=STEPS, seed=seed, plan=plan).latents.cpu()


def check_plan(recording: Pipeline, plain: Pipeline, cpu: Pipeline, plan: str) -> None:
    """Replayed steps give what steps run segment by segment give, to the bit or nearly; both are near the CPU's."""
    precision = recording.manifest.precision
    expected = latents(plain, plan)
    for _ in range(3):
        made = latents(recording, plan)
        assert recording.graphs is not None
        assert recording.graphs._graphs, "nothing was recorded"
        assert relative_error(made, expected) < 1e-3
    if plan != "adaptive:0.2" or precision == "fp32":  # rounding may tip an adaptive rule
        assert relative_error(expected, latents(cpu, plan)) < CLOSE[precision]


@pytest.mark.parametrize("plan", PLANS)
def test_the_torch_engine(torch_bundle: Bundle, plan: str) -> None:
    recording, plain, cpu = (Pipeline(torch_bundle, Torch(device)) for device in ("cuda", "cuda", "cpu"))
    plain.graphs = None
    check_plan(recording, plain, cpu, plan)


@pytest.mark.parametrize("plan", PLANS)
def test_tensorrt_rtx(rtx_bundle: Bundle, plan: str) -> None:
    recording, plain = (Pipeline(rtx_bundle, make_engine("tensorrt-rtx")) for _ in range(2))
    plain.graphs = None
    check_plan(recording, plain, Pipeline(rtx_bundle, Torch("cpu")), plan)


def recording_with(bundle: Bundle, recorder: CudaRecorder, limit: int = LIMIT) -> tuple[Pipeline, CudaGraphCache, Pipeline]:
    """A pipeline that records with this recorder, its recordings, and a pipeline that records nothing."""
    pipeline, plain = (Pipeline(bundle, Torch("cuda")) for _ in range(2))
    plain.graphs = None
    graphs = pipeline.graphs = pipeline.swapper._graphs = CudaGraphCache(recorder, limit=limit)
    return pipeline, graphs, plain


@drill
@pytest.mark.parametrize("engine", ["torch", "tensorrt-rtx"])
def test_threads_get_what_they_get_alone(request: pytest.FixtureRequest, torch_bundle: Bundle, engine: str) -> None:
    bundle = torch_bundle if engine == "torch" else request.getfixturevalue("rtx_bundle")
    pipeline = Pipeline(bundle, make_engine(engine))
    seeds = range(8)
    alone = [latents(pipeline, "deepcache:3", seed) for seed in seeds]
    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(lambda seed: latents(pipeline, "deepcache:3", seed), seeds))
        for one, expected in zip(made, alone, strict=True):
            assert relative_error(one, expected) < 1e-3


@drill
def test_more_kinds_than_are_kept(torch_bundle: Bundle) -> None:
    pipeline, graphs, plain = recording_with(torch_bundle, CudaRecorder(torch.device("cuda")), limit=2)
    expected = {plan: latents(plain, plan) for plan in PLANS}
    for _ in range(3):
        for plan in PLANS:
            assert relative_error(latents(pipeline, plan), expected[plan]) < 1e-3
            assert len(graphs._graphs) <= 2


@drill
def test_a_capture_that_fails_leaves_all_as_it_was() -> None:
    recorder, x = CudaRecorder(torch.device("cuda")), torch.ones(1000, device="cuda")
    before = torch.cuda.current_stream()

    def waits() -> torch.Tensor:
        made = x + 1
        torch.cuda.synchronize()  # which no capture can hold
        return made

    with recorder.on_stream(), pytest.raises(CannotRecord):
        recorder.record(waits)
    assert torch.cuda.current_stream() == before
    torch.cuda.empty_cache()
    assert float((x + 1).sum()) == 2000
    with recorder.on_stream():
        recording = recorder.record(lambda: x * 3)
        recording.replay()
    assert float(recording.outputs.sum()) == 3000


@drill
def test_graphs_are_let_go_while_replays_are_under_way(torch_bundle: Bundle) -> None:
    pipeline = Pipeline(torch_bundle, Torch("cuda"))
    expected = latents(pipeline, "full")
    assert pipeline.graphs is not None
    for _ in range(5):
        made = pipeline.generate(PROMPT, steps=STEPS, seed=1).latents
        pipeline.graphs.clear()
        assert relative_error(made.cpu(), expected) < 1e-3


class Counting(CudaRecorder):
    """Counts what it records."""

    count = 0

    def record(self, work: Callable[[], Any]) -> Recording[Any]:
        self.count += 1
        return super().record(work)


@drill
def test_forty_kinds_of_step(torch_bundle: Bundle) -> None:
    recorder = Counting(torch.device("cuda"))
    pipeline, graphs, plain = recording_with(torch_bundle, recorder)
    held = []
    for _ in range(2):
        for height, width in SIZES:
            call: dict[str, Any] = {"steps": 3, "seed": 1, "plan": "deepcache:3", "height": height, "width": width}
            made, expected = (one.generate(PROMPT, **call).latents for one in (pipeline, plain))
            assert relative_error(made, expected) < 1e-3, (height, width)
            assert len(graphs._graphs) <= LIMIT
        held.append(torch.cuda.memory_reserved())
    assert recorder.count == 80, "all of a round have gone before the next comes to them"
    assert held[1] <= 2 * held[0], "those that went keep no memory"


class Short(CudaRecorder):
    """Records on a device that has too little memory for it."""

    is_short = True

    def _capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        def wants_too_much() -> Any:
            outputs = work()
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
            return outputs

        return super()._capture(wants_too_much if self.is_short else work)


@drill
def test_no_memory_for_a_recording(torch_bundle: Bundle) -> None:
    recorder = Short(torch.device("cuda"))
    pipeline, graphs, plain = recording_with(torch_bundle, recorder)
    expected, before = latents(plain, "deepcache:3"), torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="steps run piece by piece, not as CUDA graphs"):
        made = latents(pipeline, "deepcache:3")
    assert relative_error(made, expected) < 1e-3
    assert not graphs._graphs
    assert torch.cuda.current_stream() == before
    recorder.is_short = False
    assert relative_error(latents(pipeline, "deepcache:3"), expected) < 1e-3
    assert graphs._graphs, "the next call may need less"


@drill
def test_no_memory_for_a_picture(torch_bundle: Bundle) -> None:
    pipeline = Pipeline(torch_bundle, Torch("cuda"))
    expected = latents(pipeline, "deepcache:3")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / torch.cuda.mem_get_info()[1])
    try:
        with pytest.raises((EngineMemoryError, torch.OutOfMemoryError)):
            pipeline.generate(PROMPT, steps=STEPS, seed=1, height=1024, width=1024)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert relative_error(latents(pipeline, "deepcache:3"), expected) < 1e-3
