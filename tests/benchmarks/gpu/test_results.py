"""Runs of single stages and parts, one after another: what the file of results keeps, and what it lets go."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import gpu_check
from benchmarks.gpu.found import Found, Row

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="writes as a machine without a GPU does")

CARD = {"driver_version": "580.1"}
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the check with parts that find a row each; returns what is written."""
    card, weights = dict(CARD), ["of the first training"]
    monkeypatch.setattr(gpu_check, "card_state", lambda: card)
    monkeypatch.setattr(gpu_check, "check_engines", lambda names, *rest: (list(names), {}))
    monkeypatch.setattr(gpu_check, "open_source", lambda source, variant: Weights(source, weights[0]))
    monkeypatch.setattr(gpu_check._Check, "_parts", parts)

    def check(*arguments: str, driver: str = "580.1", trained: str = "of the first training") -> dict[str, Any]:
        card["driver_version"], weights[0] = driver, trained
        folders = ["--out", str(tmp_path), "--work", str(tmp_path / "work")]
        gpu_check.main(["--device", "cpu", "--budget", "inf", *folders, *arguments])
        written: dict[str, Any] = json.loads((tmp_path / "gpu-cpu-original.json").read_text())
        return written

    return check


class Weights:
    """A source, as far as its digest goes."""

    def __init__(self, source: str, weights: str) -> None:
        self.digest = f"{source} {weights}"

    def fingerprint(self, variant: str, digest: object) -> str:
        return self.digest


def parts(check: Any, stage: Any, found: Found) -> Any:
    """A part for each of a stage's."""
    for part in stage.parts or ("tests",):

        def work(part: str = part) -> None:
            if part == "start":
                found.starts["torch fp16"] = {"load_seconds": float(check.options.rounds)}
            else:
                found.rows.append(Row(part, "fp16", "full", None, None, float(check.options.rounds), None, 1, None, None))

        yield f"{part} fp16", work


def rows(written: dict[str, Any]) -> dict[str, list[str]]:
    return {name: [row["engine"] for row in stage["rows"]] for name, stage in written["stages"].items()}


def test_other_stages_stay(run: Run) -> None:
    run("--only", "correct")
    written = run("--only", "rtx")
    assert rows(written) == {"correct": ["segments", "plans"], "rtx": ["plans"]}
    assert rows(run("--only", "driver")) == {"driver": ["tests"], "correct": ["segments", "plans"], "rtx": ["plans"]}


def test_other_parts_of_a_stage_stay(run: Run) -> None:
    run("--only", "rtx,plans")
    written = run("--only", "rtx,start")
    assert rows(written) == {"rtx": ["plans"]}
    assert written["stages"]["rtx"]["starts"] == {"torch fp16": {"load_seconds": 5.0}}
    assert set(written["stages"]["rtx"]["seconds"]) == {"plans fp16", "start fp16"}


def test_another_driver_is_another_machine(run: Run) -> None:
    run("--only", "correct")
    assert rows(run("--only", "rtx", driver="581.0")) == {"rtx": ["plans"]}


def test_other_versions_are_another_machine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("--only", "correct")
    monkeypatch.setattr(gpu_check, "_versions", lambda: {"tensorrt_rtx": "9.9"})
    written = run("--only", "rtx")
    assert rows(written) == {"rtx": ["plans"]}
    assert written["versions"]["tensorrt_rtx"] == "9.9"


def test_weights_that_were_trained_again_are_others(run: Run) -> None:
    run("--only", "driver,correct")
    assert rows(run("--only", "rtx", trained="of the second")) == {"driver": ["tests"], "rtx": ["plans"]}


def test_other_settings_are_not_mixed(run: Run) -> None:
    run("--only", "correct,rtx")
    assert rows(run("--only", "rtx", "--rounds", "7")) == {"rtx": ["plans"]}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"versions": {}, "driver": {}, "rows": []}'])
def test_a_file_that_is_none_of_ours_is_written_anew(run: Run, tmp_path: Path, text: str) -> None:
    (tmp_path / "gpu-cpu-original.json").write_text(text)
    assert rows(run("--only", "correct")) == {"correct": ["segments", "plans"]}


def test_findings_in_another_form_go(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "gpu-cpu-original.json"
    written = run("--only", "correct,rtx")
    written["stages"]["correct"]["rows"][0]["more"] = 1
    del written["stages"]["correct"]["cards"]
    path.write_text(json.dumps(written))
    assert rows(run("--only", "rtx,start")) == {"rtx": ["plans"]}
