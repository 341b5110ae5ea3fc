"""The check of what runs on a GPU: tried on the CPU, where there are no graphs, and refused where it needs one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import Fit, Found, Row, main
from engines import Engine, UserError
from tests.sources import save_source

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@no_gpu
def test_without_a_gpu_there_is_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"the check needs an NVIDIA GPU and a PyTorch built for CUDA \(.*--device cpu"):
        main([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engines", "torch,tensort"], "--engines: unknown 'tensort'; choose from: onnxruntime, tensorrt, "),
        (["--precision", "fp8"], "--precision: unknown 'fp8'; choose from: fp32, fp16"),
        (["--device", "tpu"], "invalid choice"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_a_users_mistake(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(arguments)


@no_gpu
@pytest.mark.slow
def test_the_program_itself_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_source(tmp_path / "tiny")
    main(
        ["--device", "cpu", "--engines", "torch,tensorrt-rtx", "--precision", "fp32", "--plans", "full,block:2", "--source",
         str(source), "--steps", "3", "--rounds", "1", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    )  # fmt: skip
    found = json.loads((tmp_path / "gpu-cpu-tiny-original.json").read_text())
    assert found["faults"] == []
    assert set(found["skipped"]) == {"tensorrt-rtx fp32"}
    assert "runs on an NVIDIA GPU only" in found["skipped"]["tensorrt-rtx fp32"]
    assert max(fit["error"] for fit in found["segments"]["torch fp32"].values()) < 1e-4
    assert min(fit["cosine"] for fit in found["segments"]["torch fp32"].values()) > 0.9999
    assert {"the chain", "stem", "vae_decoder"} <= set(found["segments"]["torch fp32"])
    rows = {row["plan"]: row for row in found["rows"]}
    assert rows["block:2"]["milliseconds"] > 0
    assert rows["full"]["error"] is None
    assert rows["full"]["graphs_error"] is None
    assert rows["full"]["planned_bytes"] > 0
    assert "left out: tensorrt-rtx fp32" in capsys.readouterr().out


@no_gpu
def test_an_engine_that_breaks_off_does_not_lose_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu_check._bundle", lambda *given: None)
    monkeypatch.setattr("benchmarks.gpu_check.Pipeline", lambda bundle, engine: engine)
    row = Row("onnxruntime", "fp32", "full", None, None, 1.0, None, 1, None)

    def check(found: Found, engine: Engine, *rest: object) -> None:
        if engine.name == "torch":
            raise RuntimeError("an illegal memory access")
        found.rows.append(row)

    monkeypatch.setattr("benchmarks.gpu_check._check", check)
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--engines", "torch,onnxruntime", "--precision", "fp32", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "gpu-cpu-mini-original.json").read_text())
    assert found["faults"] == ["torch fp32: broke off: RuntimeError: an illegal memory access"]
    assert [one["engine"] for one in found["rows"]] == ["onnxruntime"]


def test_what_is_wrong_is_named() -> None:
    good = Row("torch", "fp16", "full", 0.5, 0.0, 1.0, 1.0, 1, 1)
    bad = Row("torch", "fp16", "block:3", 0.5, float("nan"), 1.0, 1.0, 1, 1)
    half = {"stem": Fit(4e-3, 1.0), "head": Fit(6e-3, 1.0), "mid": Fit(1e-3, 0.999)}
    found = Found([good, bad], {"torch fp16": half, "torch fp32": {"stem": Fit(4e-3, 1.0)}}, {"torch fp16": 30.0})
    assert found.faults() == [
        "torch fp16: segment head is off by 6.0e-03, its cosine by 0.0e+00",
        "torch fp16: segment mid is off by 1.0e-03, its cosine by 1.0e-03",
        "torch fp32: segment stem is off by 4.0e-03, its cosine by 0.0e+00",
        "torch fp16: latents have a PSNR of 30.0 dB, not 35",
        "torch fp16 block:3: replayed steps are off by nan",
    ]
