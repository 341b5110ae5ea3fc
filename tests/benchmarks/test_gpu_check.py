"""The check of what runs on a GPU: tried on the CPU, where there are no graphs, and refused where it needs one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import Row, _faults, main
from engines import UserError

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
def test_the_program_itself_runs_on_a_cpu(bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        ["--device", "cpu", "--engines", "torch,tensorrt-rtx", "--precision", "fp32", "--plans", "full,deepcache:2",
         "--steps", "3", "--rounds", "1", "--work", str(bundles), "--out", str(tmp_path)]
    )  # fmt: skip
    found = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert found["faults"] == []
    assert set(found["skipped"]) == {"tensorrt-rtx fp32"}
    assert "runs on an NVIDIA GPU only" in found["skipped"]["tensorrt-rtx fp32"]
    assert max(found["segments"]["torch fp32"].values()) < 1e-4
    assert {"the chain", "stem", "vae_decoder"} <= set(found["segments"]["torch fp32"])
    rows = {row["plan"]: row for row in found["plans"]}
    assert rows["deepcache:2"]["milliseconds"] < rows["full"]["milliseconds"]
    assert rows["full"]["error"] == 0
    assert rows["full"]["graphs_error"] is None
    assert rows["full"]["planned_bytes"] > 0
    assert "left out: tensorrt-rtx fp32" in capsys.readouterr().out


def test_what_is_wrong_is_named() -> None:
    good = Row("torch", "fp16", "full", 0.5, 0.0, 1.0, 1.0, 1, 1)
    bad = Row("torch", "fp16", "block:3", 0.5, float("nan"), 1.0, 1.0, 1, 1)
    faults = _faults([good, bad], {"torch fp16": {"stem": 4e-3, "head": 6e-3}, "torch fp32": {"stem": 4e-3}})
    assert faults == [
        "torch fp16: segment head is off by 6.0e-03",
        "torch fp32: segment stem is off by 4.0e-03",
        "torch fp16 block:3: replayed steps are off by nan",
    ]
