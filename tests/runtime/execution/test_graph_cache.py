"""Recorded steps give what steps run segment by segment give: on a stand-in for CUDA graphs, where a wrong address shows."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from engines import Manifest, Unit
from engines.bundle.shapes import resolve
from engines.cuda.graphs import CudaRecorder
from engines.errors import EngineMemoryError
from engines.tensorrt.error_log import ErrorLog
from engines.tensorrt.runner import EngineRunner
from engines.tensorrt.workspace import StreamWorkspace
from runtime import Executor, LoadedBundle, Plan, PlanError, Rule, Schedule, UNetRange, find_plan
from runtime.execution.graph_cache import CudaGraphCache
from runtime.images.prediction_spaces import PredictionSpaces
from runtime.plans.checks import check_runs
from runtime.plans.key_steps import Explicit, Threshold, Uniform
from runtime.plans.words import Guidance, Predict
from tests.support.device_memory import use_device_memory
from tests.support.fake_tensorrt import FakeTensorRT, Program
from tests.support.recording import FakeRecorder
from tests.support.reference import reference_denoise, reference_scheduler
from tests.support.unets import TEXT_WIDTH, TOKENS, live_network, make_manifest, manifest_of, relative_error, small_unet
from tests.support.unit_graphs import Case, arithmetic_network, cases, cut, inputs_of_step, predictions_unit_by_unit

STEPS = 9
PLANS = {
    "full": find_plan("full"),
    "deepcache:3": find_plan("deepcache:3"),
    "block:2": find_plan("block:2"),
    "unit:3": find_plan("unit:3"),
    "kept at some key steps": Plan(name="k", rules=(Rule(units=("up.1",), when=Explicit(steps=(0, 1, 4))),)),
    "two rules": find_plan("block:2+unit:3"),
    "a rule inside another": find_plan("deepcache:4+block:3"),
    "a rule around another": find_plan("block:3+deepcache:4"),
    "adaptive": Plan(name="a", rules=(Rule(units=("up.1",), when=Threshold(above=0.2)),)),
    "adaptive, to the middle": Plan(
        name="m", rules=(Rule(units=("up.1",), when=Threshold(above=0.05, feature="down.1.layer.0.attention")),)
    ),
    "adaptive and not": Plan(
        name="b",
        rules=(
            Rule(units=("up.1",), when=Threshold(above=0.2)),
            Rule(units=("up.2.layer.0",), when=Explicit(steps=(0, 3))),
        ),
    ),
    "a forecast": find_plan("forecast:2"),
    "a forecast and halves": find_plan("forecast:2+guide:3"),
    "skips and halves": find_plan("skip:2+deepcache:3+guide:2"),
    "an adaptive forecast": Plan(
        name="f",
        rules=(Rule(units=("up.1",), when=Threshold(above=0.2), predict=Predict()),),
        guidance=Guidance(when=Uniform(every=2)),
    ),
}


def fake_tensorrt_network(live: LoadedBundle) -> LoadedBundle:
    """The live modules as engines of the fake TensorRT, which reads and writes by address."""
    manifest, programs = live.manifest, {}
    sides = [{"batch": batch, "height": side, "width": side} for batch, side in ((1, 8), (4, 32))]
    for name, runner in live.runners.items():
        segment, module = manifest.segment(name), runner.module  # type: ignore[attr-defined]
        limits = {key: tuple(resolve(manifest.features[key].shape, sizes) for sizes in sides) for key in segment.inputs}
        programs[name.encode()] = Program(module, limits, segment.outputs)  # type: ignore[arg-type]
    trt, place = FakeTensorRT(programs), StreamWorkspace(torch.device("cpu"))
    runtime, log = trt.Runtime(trt.ILogger()), ErrorLog(trt)
    runners = {
        name: EngineRunner(
            manifest.segment(name),
            manifest.features,
            (runtime, runtime.deserialize_cuda_engine(name.encode())),
            lambda engine: (engine.create_execution_context("user managed"), None),
            log,
            "fake",
            place,
        )
        for name in live.runners
    }
    return LoadedBundle(manifest, runners)


@pytest.fixture(params=[lambda live: live, fake_tensorrt_network], ids=["torch", "tensorrt"])
def make(request: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[LoadedBundle], LoadedBundle]:
    """What makes a network of the tested kind from one of live modules."""
    if request.param is fake_tensorrt_network:
        use_device_memory(monkeypatch)
    made: Callable[[LoadedBundle], LoadedBundle] = request.param
    return made


@pytest.fixture(scope="module")
def unet() -> Any:
    return small_unet("no mid")


@pytest.fixture(scope="module")
def manifest(unet: Any) -> Manifest:
    return manifest_of(unet, "layer", [*PLANS.values()])


@pytest.fixture
def recorder() -> FakeRecorder:
    return FakeRecorder()


def inputs(seed: int, rows: int = 2, height: int = 8, width: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, height, width, generator=generator), torch.randn(rows, TOKENS, TEXT_WIDTH, generator=generator)


class Loop:
    """One call, step by step; with halves of guidance, the two pictures stand for them.

    PNDM's scheduler holds on to predictions as they are.
    """

    def __init__(
        self, networks: Mapping[str, LoadedBundle], plan: Plan, start: tuple[Tensor, Tensor], graphs: CudaGraphCache | None = None
    ) -> None:
        self.noise = reference_scheduler("pndm", STEPS)
        timesteps = self.noise.timesteps.tolist()
        manifests, guided = {name: network.manifest for name, network in networks.items()}, plan.guidance is not None
        schedule = Schedule(plan.checked(), manifests, timesteps, guided=guided)
        check_runs(schedule)
        self.executor = Executor(networks, schedule, graphs, spaces=PredictionSpaces(self.noise.alphas_cumprod, "epsilon"))
        self.latents, self.text = start
        self.kinds: list[str] = []

    def step(self) -> None:
        timestep = self.noise.timesteps[len(self.kinds)]
        # Every step's inputs are new tensors, as a pipeline's are.
        prediction, record = self.executor.step(
            len(self.kinds), self.latents.clone(), timestep.reshape(1).to(self.latents.device, torch.float32), self.text.clone()
        )
        self.latents = self.noise.step(prediction, timestep, self.latents).prev_sample
        self.kinds.append(record.kind)

    def finish(self) -> Tensor:
        while len(self.kinds) < len(self.noise.timesteps):
            self.step()
        return self.latents


Reference = Callable[..., tuple[Tensor, list[str]]]


@pytest.fixture(scope="module")
def reference(unet: Any, manifest: Manifest) -> Reference:
    """A call of live modules without graphs, once for each plan and start: its latents, and the kinds of its steps."""
    live = live_network(unet, manifest)
    known: dict[tuple[object, ...], tuple[Tensor, list[str]]] = {}

    def compute(plan: Plan, *start: int) -> tuple[Tensor, list[str]]:
        key = (plan.name, *start)
        if key not in known:
            loop = Loop({"one": live}, plan, inputs(*start))
            known[key] = loop.finish(), loop.kinds
        return known[key]

    return compute


def same(made: Tensor, expected: Tensor) -> None:
    """The same operations in the same order; the last bit may depend on where a tensor lies in memory."""
    assert relative_error(made, expected) < 1e-5


@pytest.mark.parametrize("name", list(PLANS))
def test_replayed_steps_are_steps(
    unet: Any, manifest: Manifest, recorder: FakeRecorder, make: Any, reference: Reference, name: str
) -> None:
    plan, graphs = PLANS[name], CudaGraphCache(recorder)
    network = make(live_network(unet, manifest))
    recorded = []
    for seed in range(2):
        (expected, kinds), loop = reference(plan, seed), Loop({"one": network}, plan, inputs(seed), graphs)
        same(loop.finish(), expected)
        assert loop.kinds == kinds
        recorded.append(recorder.recorded)
    if "adaptive" not in name:
        assert len(set(recorded)) == 1, "the first call has seen every kind of step"
    assert recorder.replayed >= 2 * (STEPS - loop.kinds.count("skip"))


def test_against_the_model_itself(unet: Any, manifest: Manifest, recorder: FakeRecorder, make: Any) -> None:
    """Not only against ourselves: diffusers' UNet with hooks, from the same noise."""
    graphs, network = CudaGraphCache(recorder), make(live_network(unet, manifest))
    for seed in range(2):
        latents, text = inputs(seed)
        loop = Loop({"one": network}, PLANS["block:2"], (latents, text), graphs)
        noise = reference_scheduler("pndm", STEPS)
        paths = ["up_blocks.1.upsamplers.0"]
        expected, _ = reference_denoise(unet, noise, latents, text, 1.0, set(range(0, STEPS + 1, 2)), paths)
        assert relative_error(loop.finish(), expected) < 1e-4


@pytest.mark.parametrize("carry", [False, True])
def test_a_switch_of_unets(manifest: Manifest, unet: Any, recorder: FakeRecorder, make: Any, carry: bool) -> None:
    torch.manual_seed(1)
    other = small_unet("no mid")
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    ranges = (UNetRange(unet="one", start=0, stop=0.5), UNetRange(unet="two", start=0.5, stop=1))
    plan = Plan(name="s", unets=ranges, rules=(Rule(units=("up.1",), when=Explicit(steps=(0, 1, 6))),), carry=carry)
    lives = {"one": live_network(unet, manifest), "two": live_network(other, manifest)}
    networks, graphs = {name: make(live) for name, live in lives.items()}, CudaGraphCache(recorder)
    for seed in range(2):
        same(Loop(networks, plan, inputs(seed), graphs).finish(), Loop(lives, plan, inputs(seed)).finish())


def test_shapes_may_change_and_change_back(
    unet: Any, manifest: Manifest, recorder: FakeRecorder, make: Any, reference: Reference
) -> None:
    plan, graphs = PLANS["deepcache:3"], CudaGraphCache(recorder)
    network = make(live_network(unet, manifest))
    for number, shape in enumerate([(2, 8, 16), (1, 16, 8), (2, 8, 16), (4, 8, 8), (1, 16, 8)]):
        same(
            Loop({"one": network}, plan, inputs(number, *shape), graphs).finish(),
            reference(plan, number, *shape)[0],
        )
    kinds = recorder.recorded // 3
    assert recorder.recorded == 3 * kinds, "each shape once"


def test_inherit_steps_read_a_feature_where_the_key_step_left_it(
    unet: Any, manifest: Manifest, recorder: FakeRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_device_memory(monkeypatch)
    graphs, network = CudaGraphCache(recorder), fake_tensorrt_network(live_network(unet, manifest))
    Loop({"one": network}, PLANS["block:2"], inputs(0), graphs).finish()
    written, read = set(), set()
    for runner in network.runners.values():
        for context in runner._engine.contexts:  # type: ignore[attr-defined]
            written.add(context.in_graph.get("up.1.sampler") if "up.1.sampler" in runner.segment.outputs else None)
            read.add(context.in_graph.get("up.1.sampler") if "up.1.sampler" in runner.segment.inputs else None)
    assert len(written - {None}) == 1
    assert written < read, "the key step itself reads it in the memory that all recordings share"
    assert len(read - written) == 1, "inherit steps read it where it lasts"


def test_two_calls_in_turns(unet: Any, manifest: Manifest, recorder: FakeRecorder, make: Any, reference: Reference) -> None:
    """The recordings' memory is one call's; another that runs meanwhile does without."""
    plan, graphs = PLANS["block:2"], CudaGraphCache(recorder)
    network = make(live_network(unet, manifest))
    Loop({"one": network}, plan, inputs(9), graphs).finish()
    loops = [Loop({"one": network}, plan, inputs(seed), graphs) for seed in range(2)]
    for _ in loops[0].noise.timesteps:
        for loop in loops:
            loop.step()
    for seed, loop in enumerate(loops):
        same(loop.latents, reference(plan, seed)[0])
    assert graphs.take()


def test_calls_in_threads(unet: Any, manifest: Manifest, recorder: FakeRecorder, make: Any, reference: Reference) -> None:
    plan, graphs = PLANS["block:2"], CudaGraphCache(recorder)
    network = make(live_network(unet, manifest))

    def call(seed: int) -> Tensor:
        return Loop({"one": network}, plan, inputs(seed), graphs).finish()

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(call, range(6)))
    for seed, latents in enumerate(found):
        same(latents, reference(plan, seed)[0])


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_a_call_that_breaks_off_leaves_the_graphs_to_the_next(
    unet: Any, manifest: Manifest, recorder: FakeRecorder, make: Any, reference: Reference, how: str
) -> None:
    plan, graphs = PLANS["deepcache:3"], CudaGraphCache(recorder)
    network = make(live_network(unet, manifest))
    Loop({"one": network}, plan, inputs(0), graphs).finish()
    broken = Loop({"one": network}, plan, inputs(1), graphs)
    broken.step()
    broken.step()
    assert not graphs.take()
    if how == "closed":
        broken.executor.close()
        broken.executor.close()
    else:
        del broken
        gc.collect()
    before = recorder.recorded, recorder.replayed
    same(Loop({"one": network}, plan, inputs(2), graphs).finish(), reference(plan, 2)[0])
    assert recorder.recorded == before[0]
    assert recorder.replayed > before[1]


@pytest.mark.slow
@pytest.mark.parametrize(("limits", "alive"), [({"limit": 2}, 2), ({"limit_bytes": 1}, 1)])
def test_few_are_kept_where_few_may_be(
    unet: Any, manifest: Manifest, recorder: FakeRecorder, make: Any, reference: Reference, limits: dict[str, int], alive: int
) -> None:
    plan, graphs = PLANS["two rules"], CudaGraphCache(recorder, **limits)
    network = make(live_network(unet, manifest))
    for seed in range(2):
        same(Loop({"one": network}, plan, inputs(seed), graphs).finish(), reference(plan, seed)[0])
        gc.collect()
        assert recorder.alive == alive
    assert recorder.recorded > 4
    graphs.clear()
    gc.collect()
    assert recorder.alive == 0
    assert recorder.let_go_under_way == 0


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize(
    "error",
    [RuntimeError("operation not\npermitted"), torch.OutOfMemoryError("no memory left"), EngineMemoryError("no memory left")],
)
def test_what_cannot_be_recorded_runs_all_the_same(
    unet: Any, manifest: Manifest, recorder: FakeRecorder, make: Any, reference: Reference, before: int, error: Exception
) -> None:
    """From the start, or when the first steps of a call are recorded already, and later ones inherit from them."""
    plan, graphs = PLANS["block:2"], CudaGraphCache(recorder)
    network = make(live_network(unet, manifest))
    loop = Loop({"one": network}, plan, inputs(0), graphs)
    for _ in range(before):
        loop.step()
    recorder.broken = error
    with pytest.warns(UserWarning, match="not as CUDA graphs, which costs time: (operation not permitted|no memory left)"):
        loop.finish()
    same(loop.latents, reference(plan, 0)[0])
    gc.collect()
    assert recorder.alive == 0
    recorder.broken = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(Loop({"one": network}, plan, inputs(1), graphs).finish(), reference(plan, 1)[0])
    is_for_good = str(error) != "no memory left"
    assert (recorder.alive == 0) == is_for_good, "the next call may have more memory"
    assert graphs.take() != is_for_good


@settings(max_examples=100, deadline=None)
@given(cases())
def test_any_graph_any_cut_any_plan(case: Case) -> None:
    schedule = case.schedule()
    try:
        check_runs(schedule)
    except PlanError:
        assume(False)
    graphs, network = CudaGraphCache(FakeRecorder()), arithmetic_network(case.manifest, [])
    for _ in range(2):
        executor = Executor({"original": network}, case.schedule(), graphs)
        made = []
        for index in range(case.steps):
            own = inputs_of_step(index)
            made.append(executor.step(index, own["sample"], own["timestep"], own["text_encoder"])[0])
        assert [int(one) for one in made] == predictions_unit_by_unit(case)


def test_an_inherited_feature_that_is_made_again_all_the_same() -> None:
    """What runs for one feature may make another that is inherited: its readers get the inherited one."""
    units = [Unit(name=name, kind="unit", inputs=reads) for name, reads in (("a", ("sample",)), ("b", ("sample",)))]
    units.append(Unit(name="head", kind="unit", inputs=("a", "b")))
    plan = Plan(name="p", rules=(Rule(units=("a",), when=Explicit(steps=(0, 2))),))
    manifest = make_manifest(units=tuple(units), segments=cut(units, [units[:2], units[2:]]))
    case, graphs = Case(manifest, plan, 4), CudaGraphCache(FakeRecorder())
    executor, made = Executor({"original": arithmetic_network(manifest, [])}, case.schedule(), graphs), []
    for index in range(case.steps):
        own = inputs_of_step(index)
        made.append(int(executor.step(index, own["sample"], own["timestep"], own["text_encoder"])[0]))
    assert made == predictions_unit_by_unit(case)


def test_uniform_steps_are_recorded_once_each(unet: Any, manifest: Manifest, recorder: FakeRecorder) -> None:
    """Key, inherit, and the last key step, from which nobody inherits."""
    plan = Plan(name="u", rules=(Rule(units=("up.1",), when=Uniform(every=STEPS)),))
    graphs = CudaGraphCache(recorder)
    Loop({"one": live_network(unet, manifest)}, plan, inputs(0), graphs).finish()
    assert recorder.recorded == 3
    assert recorder.replayed == STEPS + 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(PLANS))
def test_cuda_graphs(name: str) -> None:
    """The real thing: as above, and nothing falls back."""
    unet = small_unet("uneven")
    manifest = manifest_of(unet, "layer", [*PLANS.values()])
    live = live_network(unet.cuda(), manifest)
    graphs = CudaGraphCache(CudaRecorder(torch.device("cuda")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            start = tuple(tensor.cuda() for tensor in inputs(seed))
            made = Loop({"one": live}, PLANS[name], start, graphs).finish()  # type: ignore[arg-type]
            expected = Loop({"one": live}, PLANS[name], start).finish()  # type: ignore[arg-type]
            assert relative_error(made, expected) < 1e-3
    assert graphs.take()
