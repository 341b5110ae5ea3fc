"""The check of what runs on a GPU: tried on the CPU, where there are no graphs, and refused where it needs one."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu.found import Ends, Fit, Found, Row
from benchmarks.gpu.gpu_check import main
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
    ],
)  # fmt: skip
def test_a_wrong_word_is_a_users_mistake(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_a_dry_run_says_what_would_be_done(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["--dry-run", "--source", "random:sd15", "--engines", "torch,tensorrt-rtx", "--work", str(tmp_path / "work")])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if line.split() and line.split()[0].isdecimal()]
    names = [" ".join(row[1:-2]) for row in rows]
    assert names == [
        "build fp32", "build fp16", "torch fp32", "tensorrt-rtx fp32", "torch fp16", "tensorrt-rtx fp16", "start torch fp16",
        "start tensorrt-rtx fp16", "baselines", "baselines, compiled",
    ]  # fmt: skip
    begins, takes = ([float(row[column]) for row in rows] for column in (-2, -1))
    assert begins == pytest.approx([sum(takes[:number]) for number in range(len(rows))], abs=0.3)
    assert any(f"about {sum(takes):.0f} minutes; nothing was built or run" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_within_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--dry-run", "--engines", "torch", "--precision", "fp16", "--budget", "0.9"])
    out = " ".join(capsys.readouterr().out.split())
    assert "not begun, for the budget of 0.9 minutes: start torch fp16, baselines, baselines, compiled" in out


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


@no_gpu
@pytest.mark.slow
@pytest.mark.usefixtures("counted")
@pytest.mark.usefixtures("warm_commands")
def test_the_program_itself_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_source(tmp_path / "tiny", small_unet("two stages", mid_block_type=None))
    main(
        ["--device", "cpu", "--engines", "torch,tensorrt-rtx", "--precision", "fp32", "--plans",
         "full,block:2,adaptive:0.2", "--source", str(source), "--steps", "3", "--rounds", "1", "--only", "plans,segments,start",
         "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    )  # fmt: skip
    found = json.loads((tmp_path / "gpu-cpu-tiny-original.json").read_text())
    assert found["faults"] == []
    assert set(found["skipped"]) == {"tensorrt-rtx"}
    assert "runs on an NVIDIA GPU only" in found["skipped"]["tensorrt-rtx"]
    assert found["starts"]["torch fp32"].keys() == {"import_seconds", "load_seconds", "first_seconds", "second_seconds"}
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


BREAKS = {
    "engine_named": RuntimeError("CUDA driver error"),
    "Pipeline": EngineMemoryError("segment mid: out of memory"),
    "measure_plan": torch.OutOfMemoryError("CUDA out of memory"),
    "measure_ends": RuntimeError("an illegal memory access"),
}
"""Where the first of two engines breaks off, after both were found and built for."""


class StandIns:
    """Nothing is built, loaded or run; the torch engine breaks off at one place."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.built: list[Sequence[str]] = []
        manifest = SimpleNamespace(variant="original", segments=[SimpleNamespace(engines={"torch": 1})])
        self.Bundle = SimpleNamespace(open=lambda folder: SimpleNamespace(manifest=manifest))

    def at(self, place: str, engine: str) -> None:
        if (place, engine) == (self.place, "torch"):
            raise BREAKS[place]

    def _build(self, check: object, engines: Sequence[str], precision: str) -> None:
        self.built.append(tuple(engines))

    def engine_named(self, engine: str, device: torch.device) -> str:
        self.at("engine_named", engine)
        return engine

    def Pipeline(self, bundle: object, engine: str) -> SimpleNamespace:
        self.at("Pipeline", engine)
        swapper = SimpleNamespace(bytes_of=lambda variant: 1)
        return SimpleNamespace(engine=SimpleNamespace(name=engine, scratch_bytes=lambda: 0), swapper=swapper)

    def measure_plan(self, pipeline: Any, *rest: object) -> tuple[Row, torch.Tensor]:
        self.at("measure_plan", pipeline.engine.name)
        return Row(pipeline.engine.name, "fp32", "full", None, None, 1.0, None, 1, None, None), torch.zeros(1)

    def measure_ends(self, pipeline: Any, *rest: object) -> Ends:
        self.at("measure_ends", pipeline.engine.name)
        return Ends(1.0, 1.0, None)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> StandIns:
    """In the place of what builds, loads and runs."""
    made = StandIns(getattr(request, "param", "nowhere"))
    for name in ("_build", "engine_named", "Pipeline", "Bundle", "measure_plan", "measure_ends"):
        monkeypatch.setattr(f"benchmarks.gpu.gpu_check.{name}", getattr(made, name))
    return made


def checked(folder: Path, *arguments: str) -> dict[str, Any]:
    """What a check that finds fault, or nothing, has written."""
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--precision", "fp32", "--plans", "full", "--only", "plans", "--out", str(folder),
              "--work", str(folder / "work"), *arguments])  # fmt: skip
    found: dict[str, Any] = json.loads((folder / "gpu-cpu-emoji-original.json").read_text())
    return found


@no_gpu
@pytest.mark.parametrize("stand_ins", BREAKS, indirect=True)
def test_an_engine_that_breaks_off_does_not_lose_the_others(tmp_path: Path, stand_ins: StandIns) -> None:
    error = BREAKS[stand_ins.place]
    found = checked(tmp_path, "--engines", "torch,onnxruntime")
    assert found["faults"] == [f"torch fp32: broke off: {type(error).__name__}: {error}"]
    assert [one["engine"] for one in found["rows"]] == ["torch"] * (stand_ins.place == "measure_ends") + ["onnxruntime"]


@no_gpu
def test_what_there_is_no_time_for_is_named(tmp_path: Path, stand_ins: StandIns) -> None:
    found = checked(tmp_path, "--engines", "torch", "--budget", "0")
    assert found["skipped"] == dict.fromkeys(["build fp32", "torch fp32"], "the budget of 0 minutes is used up")
    assert found["rows"] == []


@no_gpu
def test_an_engine_that_cannot_be_had_is_found_before_anything_is_built(tmp_path: Path, stand_ins: StandIns) -> None:
    main(
        ["--device", "cpu", "--engines", "torch,tensorrt", "--plans", "full", "--only", "plans", "--out", str(tmp_path),
         "--precision", "fp16", "--work", str(tmp_path / "work")]
    )  # fmt: skip
    assert stand_ins.built == [("torch",)]
    found = json.loads((tmp_path / "gpu-cpu-emoji-original.json").read_text())
    assert "runs on an NVIDIA GPU only" in found["skipped"]["tensorrt"]


@no_gpu
def test_a_source_that_is_missing_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        main(["--device", "cpu", "--engines", "torch", "--source", "./nowhere/", "--work", str(tmp_path), "--out", str(tmp_path)])


def test_what_is_wrong_is_named() -> None:
    good = Row("torch", "fp16", "full", 0.5, 0.0, 1.0, 1.0, 1000, 1090, 5000)
    bad = Row("torch", "fp16", "block:3", 0.5, float("nan"), 1.0, 1.0, 1000, 1101, 5000)
    less = Row("torch", "fp16", "unit:3", 0.5, 0.0, 1.0, 1.0, 1000, 800, 800)
    half = {"stem": Fit(4e-3, 1.0), "head": Fit(6e-3, 1.0), "mid": Fit(1e-3, 0.999)}
    found = Found([good, bad, less], {"torch fp16": half, "torch fp32": {"stem": Fit(4e-3, 1.0)}}, {"torch fp16": 30.0})
    assert found.faults() == [
        "torch fp16: segment head is off by 6.0e-03, its cosine by 0.0e+00",
        "torch fp16: segment mid is off by 1.0e-03, its cosine by 1.0e-03",
        "torch fp32: segment stem is off by 4.0e-03, its cosine by 0.0e+00",
        "torch fp16: latents have a PSNR of 30.0 dB, not 35",
        "torch fp16 block:3: replayed steps are off by nan",
        "torch fp16 block:3: features of 1000 bytes are planned, 1101 held",
        "torch fp16 unit:3: features of 1000 bytes are planned, 800 held",
    ]
