"""Two UNets that do not fit into memory together are swapped: the same latents, nothing of the one that went is left."""

from __future__ import annotations

import gc
import hashlib
import threading
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines import Bundle, BundleError, Runner, Segment, make_engine
from engines.bundle.folder import describe_file
from engines.bundle.manifest import Compiled, Manifest
from engines.bundle.shapes import resolve
from engines.cuda.graphs import CudaRecorder
from engines.errors import EngineMemoryError
from engines.tensorrt.engine import TensorRT
from runtime import Executor, Pipeline, Plan, Rule, Schedule, UNetRange, find_plan
from runtime.execution.graph_cache import CudaGraphCache
from runtime.execution.swapping import Swapper, free_bytes
from runtime.plans.key_steps import Explicit
from tests.support.commands import command
from tests.support.device_memory import use_device_memory
from tests.support.fake_tensorrt import FakeTensorRT, Program
from tests.support.recording import FakeRecorder
from tests.support.unets import TEXT_WIDTH, TOKENS, live_network, manifest_of, relative_error, segment_module, small_unet

SMALLEST = {"batch": 1, "height": 8, "width": 8}
STEPS = [900.0, 700.0, 500.0, 300.0, 100.0]
RANGES = (UNetRange(unet="one", start=0, stop=0.5), UNetRange(unet="two", start=0.5, stop=1))
RULES = (Rule(units=("up.1",), when=Explicit(steps=(0, 1, 4))),)
PLANS = {
    "one": Plan(name="one", unets=(UNetRange(unet="one", start=0, stop=1),)),
    "two": Plan(name="two", unets=(UNetRange(unet="two", start=0, stop=1),), rules=RULES),
    "switch": Plan(name="switch", unets=RANGES, rules=RULES),
    "carry": Plan(name="carry", unets=RANGES, rules=(Rule(units=("up.1",), when=Explicit(steps=(0, 3))),), carry=True),
}


class Networks:
    """Two small UNets, as live modules and as programs of the fake TensorRT by the contents of their files. Not to be changed."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        unets = {"one": small_unet("uneven"), "two": small_unet("uneven")}
        for parameter in unets["two"].parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        self.manifest = manifest_of(unets["one"], "block", list(PLANS.values()))
        self.live = {name: live_network(unet, self.manifest) for name, unet in unets.items()}
        self.programs = {
            content_of(name, segment): self._program(unet, segment)
            for name, unet in unets.items()
            for segment in self.manifest.segments
        }
        self._expected: dict[tuple[str, int], Tensor] = {}

    def _program(self, unet: Any, segment: Segment) -> Program:
        sides = [{"batch": batch, "height": side, "width": side} for batch, side in ((1, 8), (2, 16))]
        shapes = {key: self.manifest.features[key].shape for key in segment.inputs}
        limits = {key: tuple(resolve(shape, sizes) for sizes in sides) for key, shape in shapes.items()}
        return Program(segment_module(unet, self.manifest, segment), limits, segment.outputs)  # type: ignore[arg-type]

    def expected(self, name: str, seed: int) -> Tensor:
        """What live modules predict in a call."""
        if (name, seed) not in self._expected:
            self._expected[name, seed] = call(self.live, name, seed)[0]
        return self._expected[name, seed]


def content_of(name: str, segment: Segment) -> bytes:
    return f"{name} {segment.name}".encode()


class World:
    """Bundles of the two UNets in a folder, their engines in the fake TensorRT, and what the same predict as live modules."""

    def __init__(self, folder: Path, networks: Networks) -> None:
        self.programs, self.expected = dict(networks.programs), networks.expected
        self.bundles = {name: self._bundle(folder / name, name, networks.manifest) for name in networks.live}

    def _bundle(self, folder: Path, name: str, manifest: Manifest) -> Bundle:
        folder.mkdir()
        segments = []
        for segment in manifest.segments:
            path = folder / f"{segment.name}.engine"
            path.write_bytes(content_of(name, segment))
            compiled = Compiled(files=(describe_file(folder, path),), version="11.0.0")
            segments.append(segment.model_copy(update={"engines": {"tensorrt": compiled}}))
        return Bundle(folder, manifest.model_copy(update={"variant": name, "segments": tuple(segments)}))

    def swapper(
        self,
        free: int | Callable[[TensorRT], int] | None,
        graphs: CudaGraphCache | None = None,
        watch: pytest.MonkeyPatch | None = None,
    ) -> Swapper:
        """Both UNets, on a device with so much free memory; with ``watch``, launches are under way until they are waited for."""
        self.trt = FakeTensorRT(self.programs)
        if watch is not None:
            self.trt.watch_flights(watch)
        engine = TensorRT(self.trt, torch.device("cpu"))
        tell = free if callable(free) else lambda engine: free
        swapper = Swapper(self.bundles["one"], engine, graphs, lambda device: tell(engine))
        swapper.add(self.bundles["two"])
        return swapper


@pytest.fixture(scope="module")
def networks() -> Networks:
    return Networks()


@pytest.fixture
def world(tmp_path: Path, networks: Networks, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path, networks)
    use_device_memory(monkeypatch)
    return world


def call(networks: Any, name: str, seed: int, *given: Any) -> tuple[Tensor, list[int]]:
    """All predictions of a call, and the steps that swapped."""
    plan = PLANS[name]
    manifests = {part.unet: networks[part.unet].manifest for part in plan.unets}
    executor = Executor(networks, Schedule(plan.checked(), manifests, STEPS), *given)
    generator = torch.Generator().manual_seed(seed)
    text, made, swapped = torch.randn(2, TOKENS, TEXT_WIDTH, generator=generator), [], []
    for index, timestep in enumerate(STEPS):
        sample = torch.randn(2, 4, 8, 16, generator=generator)
        prediction, record = executor.step(index, sample, torch.tensor([timestep]), text)
        made.append(prediction.clone())
        if record.swap_seconds:
            swapped.append(index)
    return torch.stack(made), swapped


def same(made: Tensor, expected: Tensor) -> None:
    assert relative_error(made, expected) < 1e-5


ORDER = ["switch", "switch", "one", "switch", "two", "carry", "two", "one", "carry", "switch"]
SWAPS = [[0, 2], [0, 2], [0], [2], [], [0, 2], [], [0], [2], [0, 2]]
"""Of ten calls one after another, where the second UNet was loaded last."""


@pytest.mark.parametrize("recorded", [False, True])
def test_ten_calls_with_swaps_are_ten_calls_without(world: World, recorded: bool) -> None:
    graphs = CudaGraphCache(FakeRecorder()) if recorded else None
    swapper = world.swapper(0, graphs)
    assert swapper.swaps
    for seed, (name, expected) in enumerate(zip(ORDER, SWAPS, strict=True)):
        made, swapped = call(swapper.networks, name, seed, graphs, swapper)
        same(made, world.expected(name, seed))
        assert swapped == expected, (seed, name)


@pytest.mark.parametrize("free", [None, 2**40])
def test_what_fits_stays(world: World, free: int | None) -> None:
    swapper = world.swapper(free)
    assert not swapper.swaps
    for seed, name in enumerate(ORDER):
        made, swapped = call(swapper.networks, name, seed, None, swapper)
        same(made, world.expected(name, seed))
        assert not swapped


def test_how_much_has_to_be_free(world: World) -> None:
    size = sum(len(content) for content in world.programs if content.startswith(b"two"))
    assert world.swapper(2**40).bytes_of("two") == size
    needed = size * 1.2 + 2**30 + 4096  # what the contexts of the first UNet will work in
    assert not world.swapper(int(needed) + 1).swaps
    assert world.swapper(int(needed) - 1).swaps
    assert free_bytes(torch.device("cpu")) is None


def enlarge(world: World, name: str, memory: int) -> None:
    """Let an engine of the second UNet need so many bytes to work in."""
    key = f"two {name}".encode()
    world.programs[key] = replace(world.programs[key], memory=memory)


def right_and_swapped(world: World, swapper: Swapper) -> bool:
    """Whether UNets are swapped; calls are right in any case."""
    swapped = []
    for seed, name in enumerate(ORDER):
        made, steps = call(swapper.networks, name, seed, None, swapper)
        same(made, world.expected(name, seed))
        swapped += steps
    return bool(swapped)


def test_what_engines_will_work_in_counts(world: World) -> None:
    """The second UNet's need is known when it has been loaded: its files alone would fit."""
    size = sum(len(content) for content in world.programs if content.startswith(b"two"))
    free = int(size * 1.2) + 2**30 + 8192
    assert not world.swapper(free).swaps
    enlarge(world, "mid", 2**20)
    swapper = world.swapper(free)
    assert swapper.swaps
    assert len(swapper.networks["two"].runners) == len(world.bundles["two"].manifest.segments)
    assert not swapper.networks["one"].runners
    assert right_and_swapped(world, swapper)
    assert not world.swapper(free + 2**20).swaps


def test_memory_that_is_taken_already_is_not_counted_twice(world: World) -> None:
    engine = world.swapper(None)._engine
    assert engine.scratch_bytes() == 4096 + 1
    runner = engine.load(world.bundles["one"], world.bundles["one"].manifest.segment("mid"))
    features = {name: torch.zeros(resolve(runner.features[name].shape, SMALLEST)) for name in runner.segment.inputs}
    runner.run(features)
    assert engine.scratch_bytes() == 1  # of the text encoder and the VAE, of which there is none here


OUT_OF_MEMORY: dict[str, Exception] = {
    "PyTorch": torch.OutOfMemoryError("CUDA out of memory"),
    "the engine": EngineMemoryError("segment mid: tensorrt 11.0.0 cannot load it here: out of memory"),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=list(OUT_OF_MEMORY))
def test_a_second_unet_that_does_not_fit_after_all(world: World, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """There seemed to be room; in the middle there is none, until the first has gone."""
    load, failed = TensorRT.load, list[str]()

    def fail_once(engine: TensorRT, bundle: Bundle, segment: Segment) -> Runner:
        if bundle.folder == world.bundles["two"].folder and segment.name == "mid" and not failed:
            failed.append(segment.name)
            raise error
        return load(engine, bundle, segment)

    monkeypatch.setattr(TensorRT, "load", fail_once)
    swapper = world.swapper(2**40)
    assert failed
    assert swapper.swaps
    assert not swapper.networks["one"].runners
    assert right_and_swapped(world, swapper)


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=list(OUT_OF_MEMORY))
def test_a_second_unet_that_fits_not_even_alone(world: World, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    load = TensorRT.load

    def fail(engine: TensorRT, bundle: Bundle, segment: Segment) -> Runner:
        if bundle.folder == world.bundles["two"].folder:
            raise error
        return load(engine, bundle, segment)

    monkeypatch.setattr(TensorRT, "load", fail)
    with pytest.raises(type(error), match="out of memory"):
        world.swapper(2**40)


def test_a_unet_that_goes_is_gone_and_so_are_its_recordings(world: World) -> None:
    recorder = FakeRecorder()
    graphs = CudaGraphCache(recorder)
    swapper = world.swapper(0, graphs)
    gc.collect()
    gc.disable()
    try:
        for name, other in (("two", "one"), ("one", "two"), ("two", "one")):
            call(swapper.networks, name, 0, graphs, swapper)
            assert recorder.alive > 0
            runners = [weakref.ref(runner) for runner in swapper.networks[name].runners.values()]
            assert len(runners) == len(world.bundles[name].manifest.segments)
            with swapper.pinned(other) as seconds:
                assert seconds > 0
                assert recorder.alive == 0
                assert not any(runner() for runner in runners)
                assert not swapper.networks[name].runners
    finally:
        gc.enable()


@pytest.mark.parametrize("recorded", [False, True])
def test_no_unet_goes_while_it_is_at_work(world: World, monkeypatch: pytest.MonkeyPatch, recorded: bool) -> None:
    recorder = FakeRecorder()
    graphs = CudaGraphCache(recorder) if recorded else None
    swapper = world.swapper(0, graphs, monkeypatch)
    for seed, name in enumerate(ORDER[:4]):
        made, _ = call(swapper.networks, name, seed, graphs, swapper)
        same(made, world.expected(name, seed))
    assert world.trt.flights, "the last call is under way"
    assert (world.trt.segfaults, recorder.let_go_under_way) == ([], 0)


@pytest.mark.parametrize("recorded", [False, True])
def test_what_is_dropped_after_a_call_that_broke_off(world: World, monkeypatch: pytest.MonkeyPatch, recorded: bool) -> None:
    """As a pipeline is whose callback raised: its last step is under way when nobody holds it any more."""
    recorder = FakeRecorder()
    graphs = CudaGraphCache(recorder) if recorded else None
    swapper = world.swapper(2**40, graphs, monkeypatch)
    plan, sample, text = PLANS["one"], torch.randn(2, 4, 8, 16), torch.randn(2, TOKENS, TEXT_WIDTH)
    executor = Executor(swapper.networks, Schedule(plan, {"one": swapper.networks["one"].manifest}, STEPS), graphs, swapper)
    executor.step(0, sample, torch.tensor(STEPS[:1]), text)
    runners = [weakref.ref(runner) for runner in swapper.networks["one"].runners.values()]
    assert world.trt.flights
    assert recorder.under_way is recorded
    del executor, swapper, graphs
    gc.collect()
    assert not any(runner() for runner in runners)
    assert (world.trt.segfaults, world.trt.flights) == ([], set())
    assert (recorder.alive, recorder.let_go_under_way) == (0, 0)


def test_threads(world: World) -> None:
    """Some calls have their turn as a whole, as those of ``generate``, others, as those of ``UNet``, step by step."""
    graphs = CudaGraphCache(FakeRecorder())
    swapper = world.swapper(0, graphs)

    def run(seed: int) -> Tensor:
        if seed % 3:
            with swapper.exclusive():
                return call(swapper.networks, ORDER[seed], seed, None, swapper)[0]
        return call(swapper.networks, ORDER[seed], seed, None, swapper)[0]

    with ThreadPoolExecutor(5) as pool:
        made = list(pool.map(run, range(len(ORDER))))
    for seed, predictions in enumerate(made):
        same(predictions, world.expected(ORDER[seed], seed))


def test_a_swap_waits_for_the_step_that_runs(world: World) -> None:
    swapper = world.swapper(0)
    swapped = threading.Event()

    def other() -> None:
        with swapper.pinned("one"):
            swapped.set()

    with swapper.pinned("two"):
        thread = threading.Thread(target=other)
        thread.start()
        assert not swapped.wait(0.2)
        assert swapper.networks["two"].runners
    thread.join(10)
    assert swapped.is_set()


def test_files_are_hashed_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    swapper = world.swapper(0)
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: pytest.fail("hashed again"))
    for name in ("one", "two", "one"):
        with swapper.pinned(name):
            assert swapper.networks[name].runners


def test_a_file_that_went_is_an_error_and_what_is_there_goes_on(world: World) -> None:
    swapper = world.swapper(0)
    path = world.bundles["one"].folder / "mid.engine"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(BundleError, match="mid.engine is missing"):
        call(swapper.networks, "one", 0, None, swapper)
    same(call(swapper.networks, "two", 1, None, swapper)[0], world.expected("two", 1))
    path.write_bytes(content)
    same(call(swapper.networks, "one", 2, None, swapper)[0], world.expected("one", 2))


def test_a_file_that_was_rebuilt_in_its_place_is_not_taken_for_the_one_that_was_read(world: World) -> None:
    """Of the same name and size: a UNet would come back as that of another checkpoint."""
    swapper = world.swapper(0)
    path = world.bundles["two"].folder / "mid.engine"
    content = path.read_bytes()
    call(swapper.networks, "one", 0, None, swapper)
    path.write_bytes(content[::-1])
    with pytest.raises(BundleError, match="mid.engine is not the file that was built"):
        call(swapper.networks, "two", 1, None, swapper)
    path.write_bytes(content)
    same(call(swapper.networks, "two", 1, None, swapper)[0], world.expected("two", 1))


@pytest.mark.gpu
def test_cuda_graphs_after_all_were_let_go() -> None:
    """What one of them wrote is still held, as an inherited feature is across a switch."""
    graphs, start = CudaGraphCache(CudaRecorder(torch.device("cuda"))), torch.arange(4.0, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = graphs.run("one", {"sample": start}, lambda given: {"made": given["sample"] + 1})["made"]
        torch.cuda.synchronize()
        graphs.clear()
        inputs = {"sample": start, "inherited": first}
        second = graphs.run("two", inputs, lambda given: {"made": given["sample"] * given["inherited"]})["made"]
    assert second.tolist() == [0, 2, 6, 12]


PROMPT = "a red star on a blue background"
OPTIONS: dict[str, Any] = {"steps": 6, "scheduler": "ddim", "plan": "switch:0.4+block:2"}


@pytest.fixture
def short(mini_bundle: Bundle, assembled_bundle: Bundle) -> Pipeline:
    """The embedded model on a device that has no memory left."""
    return Pipeline(mini_bundle, make_engine("onnxruntime"), free=lambda device: 0)


def test_pictures_of_swapped_unets(short: Pipeline, mini_pipeline: Pipeline, assembled_bundle: Bundle) -> None:
    for seed in range(2):
        made, expected = (pipeline.generate(PROMPT, seed=seed, **OPTIONS) for pipeline in (short, mini_pipeline))
        assert relative_error(made.latents, expected.latents) < 1e-5
        assert made.steps == expected.steps
        switch = [record.unet for record in made.steps].index("original")
        assert [record.index for record in made.steps if record.swap_seconds] == ([0] if seed else []) + [switch]
        assert not any(record.swap_seconds for record in expected.steps)
    assert not short.networks["assembled"].runners
    assert set(mini_pipeline.networks["assembled"].runners) == {
        segment.name
        for segment in assembled_bundle.manifest.segments
        if segment.name not in {"text_encoder", "vae_decoder", "vae_encoder"}
    }, "the text encoder and the VAE are the first bundle's"


def test_calls_at_once_take_turns(short: Pipeline, mini_pipeline: Pipeline) -> None:
    """Each has the device until its end: none swaps more often than alone."""
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda seed: short.generate(PROMPT, seed=seed, **OPTIONS), range(4)))
    assert sum(bool(record.swap_seconds) for each in made for record in each.steps) == 7
    for seed, each in enumerate(made):
        assert relative_error(each.latents, mini_pipeline.generate(PROMPT, seed=seed, **OPTIONS).latents) < 1e-5


def test_the_command_states_the_cost(
    short: Pipeline, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from runtime import __main__ as module
    from runtime.command import run as work

    monkeypatch.setattr(work, "load", lambda *given: short)
    run = command(module.main, capfd, monkeypatch)
    options = ["--bundle", short.bundle.folder, "--plan", "switch:0.4", "--steps", 6, "--scheduler", "ddim", "--size", "64x64"]
    explained = run(PROMPT, *options, "--explain")
    schedule = short.schedule(find_plan("switch:0.4"), [831.0, 665.0, 499.0, 333.0, 167.0, 1.0])
    switch = [schedule.unet(index) for index in range(6)].index("original")
    sizes = {name: f"{short.swapper.bytes_of(name) / 2**20:.0f} MiB" for name in short.networks}
    assert explained.out[-1] == (
        "the UNets do not fit into the device's memory together and are swapped: "
        f"assembled ({sizes['assembled']}) before step 0, original ({sizes['original']}) before step {switch}"
    )
    made = run(PROMPT, *options, "-o", tmp_path / "made.png")
    assert any("UNets were swapped, which took" in line for line in made.out)
    plain = run(PROMPT, *options[:2], "--steps", 2, "-o", tmp_path / "plain.png")
    assert plain.code == 0
    assert not any("swapped" in line for line in plain.out), "it was there"
