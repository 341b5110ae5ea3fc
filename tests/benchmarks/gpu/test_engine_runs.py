"""What a stage builds, and which latents it compares with."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from rich.console import Console

from benchmarks.gpu import engine_runs
from benchmarks.gpu.card import LAYOUTS, engine_named
from benchmarks.gpu.engine_runs import EngineRuns, KeptLatents
from benchmarks.gpu.found import Found
from benchmarks.gpu.options import parse
from benchmarks.gpu.stages import STAGES
from benchmarks.speed.kernels import WAYS
from engines import BundleError, EngineError
from exporter import BuildOptions, job
from exporter.segments import precision as graph_precision
from tests.support.sources import save_source

CPU = torch.device("cpu")
ENGINES = ("torch", "tensorrt-rtx", "tensorrt")


def options_of(folder: Path, *arguments: str) -> Namespace:
    return parse(["--device", "cpu", "--plans", "full,deepcache:3", "--work", str(folder), *arguments], "")


def runs_of(options: Namespace, stage: str, engines: tuple[str, ...] = ENGINES, digest: str = "of the weights") -> EngineRuns:
    kept = KeptLatents(options, CPU, digest)
    return EngineRuns(options, STAGES[stage], engines, CPU, Console(), kept, Found(), lambda: None, set())


class Builds:
    """Notes what is asked to be built, under which rules, and refuses some engines."""

    def __init__(self) -> None:
        self.asked: list[BuildOptions] = []
        self.rules: list[tuple[frozenset[str], str]] = []
        self.refused: set[str] = set()
        self.held: dict[Path, tuple[str, ...]] = {}

    def build(self, options: BuildOptions) -> tuple[Any, bool]:
        self.asked.append(options)
        self.rules.append((graph_precision.WIDE, job._own_code()))
        if refused := self.refused.intersection(options.engines):
            raise EngineError(f"no {', '.join(sorted(refused))} here")
        self.held[options.folder] = options.engines
        return None, True

    def open(self, folder: Path) -> Any:
        if folder not in self.held:
            raise BundleError("there is none")
        return SimpleNamespace(manifest=SimpleNamespace(segments=[SimpleNamespace(engines=dict.fromkeys(self.held[folder]))]))


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    made = Builds()
    monkeypatch.setattr(engine_runs, "build", made.build)
    monkeypatch.setattr(engine_runs, "Bundle", SimpleNamespace(open=made.open))
    return made


def test_one_bundle_for_each_precision_and_all_engines(builds: Builds, tmp_path: Path) -> None:
    options = options_of(tmp_path, "--jobs", "4")
    runs_of(options, "correct")._build(ENGINES, "fp16")
    runs_of(options, "rtx")._build(["torch", "tensorrt-rtx"], "fp16")
    runs_of(options, "tensorrt")._build(["tensorrt"], "fp16")
    assert [(built.source, built.engines) for built in builds.asked] == [
        ("emoji", ENGINES), ("random:sd15", ENGINES[:2]), ("random:sd15", ENGINES),
    ]  # fmt: skip
    assert builds.asked[1].folder == builds.asked[2].folder != builds.asked[0].folder
    assert {built.jobs for built in builds.asked} == {4}


def test_an_engine_that_cannot_be_had_now_leaves_the_bundle(builds: Builds, tmp_path: Path) -> None:
    options = options_of(tmp_path)
    runs_of(options, "rtx")._build(["torch", "tensorrt-rtx"], "fp16")
    runs_of(options, "tensorrt", ("torch", "tensorrt"))._build(["tensorrt"], "fp16")
    assert builds.asked[-1].engines == ("torch", "tensorrt")


def test_an_engine_that_nothing_can_be_built_for_is_left_out(builds: Builds, tmp_path: Path) -> None:
    builds.refused = {"tensorrt-rtx"}
    runs = runs_of(options_of(tmp_path), "correct")
    runs._build(ENGINES, "fp32")
    assert builds.asked[-1].engines == ("torch", "tensorrt")
    assert runs.found.skipped == {"tensorrt-rtx fp32": "no tensorrt-rtx here"}


def test_the_old_precision_is_a_bundle_of_its_own_under_keys_of_its_own(builds: Builds, tmp_path: Path) -> None:
    options, wide = options_of(tmp_path, "--jobs", "4"), graph_precision.WIDE
    for stage in ("rtx", "rtx-old", "rtx"):
        runs_of(options, stage)._build(["tensorrt-rtx"], "fp16")
    (new, key), (old, other), (again, same) = builds.rules
    _, counted, _ = WAYS["opset 18, casts round norms"]
    assert old == counted == {"Softmax", "InstanceNormalization"}
    assert new == again == wide == {"Softmax"}
    assert key == same != other
    first, second, _ = builds.asked
    assert first.folder != second.folder
    assert (first.jobs, second.jobs) == (4, 1), "another process would not know of it"


@pytest.mark.slow
def test_graphs_of_the_old_precision_have_casts_round_group_norms(tmp_path: Path) -> None:
    source = save_source(tmp_path / "tiny")
    runs = runs_of(options_of(tmp_path / "work", "--source", str(source)), "rtx-old")
    bundle = runs._bundle(["onnxruntime"], "fp16")
    (path, *_) = bundle.manifest.segment("vae_decoder").onnx
    graph = onnx.load(str(bundle.folder / path.path), load_external_data=False).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    readers = {name: node.op_type for node in graph.node for name in node.input}
    norms = [node for node in graph.node if node.op_type == "InstanceNormalization"]
    assert norms
    assert {makers[name] for node in norms for name in node.input} == {"Cast"}
    assert {readers[name] for node in norms for name in node.output} == {"Cast"}


def test_kept_latents_are_of_the_weights(tmp_path: Path) -> None:
    options = options_of(tmp_path)
    KeptLatents(options, CPU, "first").keep("full", "fp32", torch.ones(3))
    found = KeptLatents(options, CPU, "first").find("full")
    assert found is not None
    assert found[0] == "torch fp32"
    assert found[1].tolist() == [1.0, 1.0, 1.0]
    assert KeptLatents(options, CPU, "trained again").find("full") is None
    assert KeptLatents(options, CPU, "first").find("deepcache:3") is None
    assert KeptLatents(options_of(tmp_path, "--steps", "7"), CPU, "first").find("full") is None


def test_kept_latents_of_half_precision_give_way_to_better_ones(tmp_path: Path) -> None:
    kept = KeptLatents(options_of(tmp_path), CPU, "first")
    for precision, value in (("fp16", 1.0), ("fp16", 2.0), ("fp32", 3.0)):
        kept.keep("full", precision, torch.tensor(value))
        found = kept.find("full")
        assert found is not None
        assert (found[0], float(found[1])) == (f"torch {precision}", 1.0 if precision == "fp16" else value)


def test_options_of_engines_are_measured_beside_the_engines(builds: Builds, tmp_path: Path) -> None:
    runs = runs_of(options_of(tmp_path), "layouts", ("torch", "tensorrt-rtx", "onnxruntime"))
    names = [name for name, _ in runs.parts()]
    assert names == ["build fp16", *(f"{name} fp16" for name in ("torch", "onnxruntime", *LAYOUTS))]
    for name, work in runs.parts():
        if name == "build fp16":
            work()
    assert builds.asked[0].engines == ("torch", "onnxruntime")
    assert runs._open("torch-channels-last", "fp16") is not None
    assert vars(engine_named("torch-channels-last", CPU))["_channels_last"] is True
    with pytest.raises(EngineError, match="prefer_nhwc on CUDA only"):
        engine_named("onnxruntime-nhwc", CPU)


def test_one_engines_option_is_not_left_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with engine_runs._own_benchmark():
        engine_named("torch-cudnn-benchmark", CPU)
        assert torch.backends.cudnn.benchmark is True
    assert torch.backends.cudnn.benchmark is False


def test_engine_torch_comes_first_where_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    options = options_of(tmp_path)
    runs = runs_of(options, "tensorrt")
    names = ["build fp16", "torch fp16", "tensorrt fp16", "start tensorrt fp16"]
    assert [name for name, _ in runs.parts()] == names
    for plan in options.plans:
        runs.kept.keep(plan, "fp16", torch.zeros(1))
    del names[1]
    assert [name for name, _ in runs.parts()] == names


def test_plans_that_were_measured_are_not_measured_again(tmp_path: Path) -> None:
    runs = runs_of(options_of(tmp_path, "--source", "mini"), "rtx")
    runs.measured.add(("mini", "torch", "fp16", False))
    assert [name for name, _ in runs.parts()] == [
        "build fp16", "tensorrt-rtx fp16", "start torch fp16", "start tensorrt-rtx fp16",
    ]  # fmt: skip
