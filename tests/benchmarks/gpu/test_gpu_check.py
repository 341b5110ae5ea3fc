"""The check of what runs on a GPU: tried on the CPU, where there are no graphs, and refused where it needs one."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu.card import check_engines
from benchmarks.gpu.found import PytestResult, Row, TextAndVae
from benchmarks.gpu.gpu_check import main
from benchmarks.gpu.gpu_tests import DRILLS
from engines import Runner, UserError
from engines.errors import EngineMemoryError
from tests.support.sources import save_source
from tests.support.unets import small_unet

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@no_gpu
def test_without_a_gpu_there_is_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"the check needs an NVIDIA GPU and a PyTorch built for CUDA \(.*--device cpu"):
        main([])


pytestmark = pytest.mark.shared_pieces


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engines", "torch,tensort"], "--engines: unknown 'tensort'; choose from: onnxruntime, openvino, "),
        (["--precision", "fp8"], "--precision: unknown 'fp8'; choose from: fp32, fp16"),
        (["--device", "tpu"], "invalid choice"),
        (["--only", "rtx,everything"], "--only: unknown 'everything'; choose from: driver, correct, rtx, "),
        (["--only", "rtx,segments"], "--only rtx,segments: these stages measure nothing of the kind"),
        (["--plans", "full,nosuch:3"], "nosuch"),
        (["--steps", "0"], "--steps 0 is too few; give 1 or more"),
        (["--rounds", "0"], "--rounds 0 is too few"),
        (["--budget", "-1"], "--budget: -1 is no number of minutes"),
        (["--budget", "nan"], "--budget: nan is no number of minutes"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_a_users_mistake(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(arguments)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of what runners return, counted while it lives, in the place of a GPU's allocator."""
    held, run = [0], Runner.run

    def counting(runner: Runner, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs = run(runner, inputs)
        for tensor in outputs.values():
            held[0] += tensor.nbytes
            weakref.finalize(tensor, let_go, tensor.nbytes)
        return outputs

    def let_go(size: int) -> None:
        held[0] -= size

    monkeypatch.setattr(Runner, "run", counting)
    monkeypatch.setattr("benchmarks.gpu.plan_runs.allocated", lambda device: held[0])


BREAKS = {
    "engine_named": RuntimeError("CUDA driver error"),
    "Pipeline": EngineMemoryError("segment mid: out of memory"),
    "measure_plan": torch.OutOfMemoryError("CUDA out of memory"),
    "measure_text_and_vae": RuntimeError("an illegal memory access"),
}
"""Where the first of two engines breaks off, after both were found and built for."""


class StandIns:
    """Nothing is built, loaded or run; the torch engine breaks off at one place."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.everywhere = False
        """Whether all engines can be had."""
        self.built: list[tuple[str, tuple[str, ...], bool]] = []
        self.started: list[str] = []
        self.allowed: list[float] = []
        self.on_build: Callable[[], None] = lambda: None
        engines = dict.fromkeys(("torch", "tensorrt-rtx", "tensorrt"))
        manifest = SimpleNamespace(variant="original", segments=[SimpleNamespace(engines=engines)])
        self.Bundle = SimpleNamespace(open=lambda folder: SimpleNamespace(manifest=manifest, folder=folder))

    def at(self, place: str, engine: str) -> None:
        if (place, engine) == (self.place, "torch"):
            raise BREAKS[place]

    def check_engines(self, names: Sequence[str], *rest: Any) -> tuple[list[str], dict[str, str]]:
        return (list(names), {}) if self.everywhere else check_engines(names, *rest)

    def build(self, runs: Any, engines: Sequence[str], precision: str) -> None:
        self.built.append((runs.stage.source(runs.options), tuple(engines), runs.stage.old_precision))
        self.on_build()

    def engine_named(self, engine: str, device: torch.device) -> str:
        self.at("engine_named", engine)
        return engine

    def Pipeline(self, bundle: Any, engine: str) -> SimpleNamespace:
        self.at("Pipeline", engine)
        swapper = SimpleNamespace(bytes_of=lambda variant: 1)
        running = SimpleNamespace(name=engine, scratch_bytes=lambda: 0)
        return SimpleNamespace(engine=running, swapper=swapper, folder=bundle.folder)

    def measure_plan(self, pipeline: Any, plan: str, *rest: object) -> tuple[Row, torch.Tensor]:
        self.at("measure_plan", pipeline.engine.name)
        precision = "fp16" if "fp16" in pipeline.folder.name else "fp32"
        return Row(pipeline.engine.name, precision, plan, None, None, 1.0, None, 1, None, None), torch.zeros(1)

    def measure_text_and_vae(self, pipeline: Any, *rest: object) -> TextAndVae:
        self.at("measure_text_and_vae", pipeline.engine.name)
        return TextAndVae(1.0, 1.0, None)

    def start_process(self, bundle: Path, engine: str, *rest: object) -> dict[str, float]:
        self.started.append(engine)
        return {"second_seconds": len(self.started)}

    def measure_apart(self, options: object, source: str, compiled: bool, found: list[Any]) -> None:
        found.append({"name": "compiled" if compiled else "eager", "milliseconds": 1.0})

    def run_tests(self, marks: str, seconds: float) -> PytestResult:
        self.allowed.append(seconds)
        return PytestResult(3, {}, {"test_no_memory": "assert 1 == 2"} if marks == DRILLS else {}, 1.0)


def _build_of(made: StandIns) -> Callable[..., None]:
    """As a method of another class."""

    def build(runs: Any, engines: Sequence[str], precision: str) -> None:
        made.build(runs, engines, precision)

    return build


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> StandIns:
    """In the place of what builds, loads and runs."""
    made = StandIns(getattr(request, "param", "nowhere"))
    for name in ("check_engines", "measure_apart", "run_tests"):
        monkeypatch.setattr(f"benchmarks.gpu.gpu_check.{name}", getattr(made, name))
    for name in ("engine_named", "Pipeline", "Bundle", "measure_plan", "measure_text_and_vae", "start_process"):
        monkeypatch.setattr(f"benchmarks.gpu.engine_runs.{name}", getattr(made, name))
    monkeypatch.setattr("benchmarks.gpu.engine_runs.EngineRuns._build", _build_of(made))
    return made


@no_gpu
@pytest.mark.slow
@pytest.mark.usefixtures("counted")
@pytest.mark.usefixtures("warm_commands")
def test_the_program_itself_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_source(tmp_path / "tiny", small_unet("two stages", mid_block_type=None))
    main(
        ["--device", "cpu", "--engines", "torch,tensorrt-rtx", "--precision", "fp32", "--plans",
         "full,block:2,adaptive:0.2", "--source", str(source), "--steps", "3", "--rounds", "1", "--only", "correct,rtx,rtx-old",
         "--budget", "inf", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    )  # fmt: skip
    written = json.loads((tmp_path / "gpu-cpu-tiny-original.json").read_text())
    assert written["faults"] == []
    assert set(written["skipped"]) == {"tensorrt-rtx", "rtx-old"}
    assert all("runs on an NVIDIA GPU only" in reason for reason in written["skipped"].values())
    found, speed = (written["stages"][name] for name in ("correct", "rtx"))
    assert speed["rows"] == [], "what the first stage has measured is not measured again"
    assert speed["starts"]["torch fp32"].keys() == {"import_seconds", "load_seconds", "first_seconds", "second_seconds"}
    assert found["ends"]["torch fp32"]["vae_milliseconds"] > 0
    assert found["ends"]["torch fp32"]["kernels"] is None
    assert max(fit["error"] for fit in found["segments"]["torch fp32"].values()) < 1e-4
    assert min(fit["cosine"] for fit in found["segments"]["torch fp32"].values()) > 0.9999
    assert {"the chain", "stem", "vae_decoder"} <= set(found["segments"]["torch fp32"])
    rows = {row["plan"]: row for row in found["rows"]}
    for row in rows.values():
        assert row["planned_bytes"] == row["features_bytes"] > 10_000, "tensors alone have no allocator that rounds"
    assert rows["block:2"]["milliseconds"] > 0
    assert rows["full"]["error"] is None
    assert rows["full"]["graphs_error"] is None
    assert rows["full"]["picture_seconds"] > 0
    assert found["memory"]["torch fp32"].keys() == {"weights_bytes", "scratch_bytes", "device_bytes"}
    assert found["memory"]["torch fp32"]["weights_bytes"] > 10_000
    assert found["memory"]["torch fp32"]["device_bytes"] is None
    assert "left out: tensorrt-rtx" in capsys.readouterr().out


def checked(folder: Path, *arguments: str) -> dict[str, Any]:
    """What a check has written, and how it ended."""
    code = 0
    try:
        main(["--device", "cpu", "--precision", "fp32", "--plans", "full", "--only", "correct,plans", "--out", str(folder),
              "--work", str(folder / "work"), *arguments])  # fmt: skip
    except SystemExit as error:
        code = int(error.code or 0)
    found: dict[str, Any] = json.loads((folder / "gpu-cpu-original.json").read_text())
    return {"code": code, **found}


@no_gpu
@pytest.mark.parametrize("stand_ins", BREAKS, indirect=True)
def test_an_engine_that_breaks_off_does_not_lose_the_others(tmp_path: Path, stand_ins: StandIns) -> None:
    error = BREAKS[stand_ins.place]
    found = checked(tmp_path, "--engines", "torch,onnxruntime")
    assert found["code"] == 1
    assert found["faults"] == [f"correct: torch fp32: broke off: {type(error).__name__}: {error}"]
    rows = found["stages"]["correct"]["rows"]
    assert [row["engine"] for row in rows] == ["torch"] * (stand_ins.place == "measure_text_and_vae") + ["onnxruntime"]


@no_gpu
def test_what_does_not_fit_the_budget_is_named_and_left_out(tmp_path: Path, stand_ins: StandIns) -> None:
    found = checked(tmp_path, "--engines", "torch", "--budget", "2.5")
    assert found["skipped"] == {"correct": "takes about 3 minutes; left of the budget of 2.5: 2.5"}
    assert found["stages"] == {}
    assert found["code"] == 1, "nothing was measured"
    assert stand_ins.built == []


@no_gpu
def test_nothing_begins_after_the_budget(tmp_path: Path, stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.on_build = lambda: monkeypatch.setattr("benchmarks.gpu.gpu_check._Check.minutes", lambda check: 3.5)
    found = checked(tmp_path, "--engines", "torch", "--budget", "3.2")
    assert found["stages"]["correct"]["skipped"] == {"torch fp32": "the budget of 3.2 minutes is used up"}


@no_gpu
def test_an_engine_that_cannot_be_had_is_found_before_anything_is_built(tmp_path: Path, stand_ins: StandIns) -> None:
    found = checked(tmp_path, "--engines", "torch,tensorrt", "--only", "correct,tensorrt,plans")
    assert stand_ins.built == [("emoji", ("torch",), False)]
    assert "runs on an NVIDIA GPU only" in found["skipped"]["tensorrt"]
    assert found["code"] == 0


@no_gpu
def test_a_source_that_is_missing_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        main(["--device", "cpu", "--engines", "torch", "--source", "./nowhere/", "--work", str(tmp_path), "--out", str(tmp_path)])


@no_gpu
def test_one_run_looks_at_a_small_source_for_correctness_and_a_large_one_for_speed(tmp_path: Path, stand_ins: StandIns) -> None:
    stand_ins.everywhere = True
    found = checked(
        tmp_path, "--engines", "torch,tensorrt-rtx,tensorrt", "--only", "plans", "--precision", "fp32,fp16", "--budget", "inf"
    )
    every = ("torch", "tensorrt-rtx", "tensorrt")
    assert stand_ins.built == [
        ("emoji", every, False), ("emoji", every, False), ("random:sd15", every[:2], False),
        ("random:sd15", ("tensorrt-rtx",), True), ("random:sd15", ("tensorrt",), False),
        ("random:sd15", ("torch",), False),
    ]  # fmt: skip
    made = {name: [(row["engine"], row["precision"]) for row in stage["rows"]] for name, stage in found["stages"].items()}
    assert made["correct"] == [(engine, precision) for precision in ("fp32", "fp16") for engine in every]
    assert made["rtx"] == [("torch", "fp16"), ("tensorrt-rtx", "fp16")]
    assert made["rtx-old"] == [("tensorrt-rtx", "fp16")]
    assert made["tensorrt"] == [("tensorrt", "fp16")]
    assert made["layouts"] == [
        ("torch-channels-last", "fp16"), ("torch-cudnn-benchmark", "fp16"), ("torch-channels-last-cudnn-benchmark", "fp16"),
    ], "torch as it is was measured before"  # fmt: skip
    assert {row["reference"] for row in found["stages"]["tensorrt"]["rows"]} == {"torch fp16"}
    assert found["stages"]["rtx"]["source"] == "random:sd15"


@no_gpu
def test_starts_alone_are_of_a_process_that_finds_what_one_has_made(tmp_path: Path, stand_ins: StandIns) -> None:
    stand_ins.everywhere = True
    found = checked(tmp_path, "--only", "rtx,start")
    assert stand_ins.started == ["torch", "torch", "tensorrt-rtx", "tensorrt-rtx"]
    assert found["stages"]["rtx"]["starts"] == {"torch fp32": {"second_seconds": 2}, "tensorrt-rtx fp32": {"second_seconds": 4}}
    assert found["code"] == 0
    stand_ins.started.clear()
    checked(tmp_path, "--only", "rtx")
    assert stand_ins.started == ["torch", "tensorrt-rtx"], "the plans were the first processes"


@no_gpu
def test_baselines_alone_build_nothing(tmp_path: Path, stand_ins: StandIns) -> None:
    found = checked(tmp_path, "--only", "baselines")
    assert stand_ins.built == []
    assert [way["name"] for way in found["stages"]["baselines"]["baselines"]] == ["eager", "compiled"]
    assert list(found["stages"]["baselines"]["seconds"]) == ["baselines", "baselines, compiled"]
    assert found["code"] == 0


@no_gpu
def test_the_tests_of_the_card_are_written_and_what_fails_is_a_fault(tmp_path: Path, stand_ins: StandIns) -> None:
    found = checked(tmp_path, "--only", "driver,drills")
    driver, drills = (found["stages"][name]["tests"] for name in ("driver", "drills"))
    assert driver["gpu and not drill"]["passed"] == 3
    assert drills["gpu and drill"]["failed"] == {"test_no_memory": "assert 1 == 2"}
    assert found["faults"] == ["drills: test_no_memory: assert 1 == 2"]
    assert found["code"] == 1


@no_gpu
def test_tests_may_take_what_is_left(tmp_path: Path, stand_ins: StandIns) -> None:
    checked(tmp_path, "--only", "driver", "--budget", "4")
    checked(tmp_path, "--only", "driver", "--budget", "inf")
    first, second = stand_ins.allowed
    assert 200 < first <= 240
    assert second == 600
