"""The order of a first session: named stages with their minutes, said by a dry run, and cut by a budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.gpu_check import main
from benchmarks.gpu.options import BUDGET, parse
from benchmarks.gpu.stages import STAGES
from engines import UserError

Shown = dict[str, tuple[str, str]]


def dry(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Shown, str]:
    """When each stage begins and what it takes, in their order, by a dry run; and all that it says."""
    main(["--dry-run", *arguments])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    rows = [line.split() for line in out.splitlines() if line.split() and line.split()[0] in STAGES]
    rows = [row for row in rows if len(row) > 3 and row[2].isdecimal()]  # not the words of another, on their second line
    return {name: (begins, takes) for name, begins, takes, *_ in rows}, " ".join(out.split())


def test_a_first_session(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown, said = dry(capsys, "--budget", "inf")
    assert list(shown.items()) == [
        ("driver", ("0", "2")), ("correct", ("2", "3")), ("rtx", ("5", "4")), ("rtx-old", ("9", "3")), ("tensorrt", ("12", "8")),
        ("baselines", ("20", "4")), ("layouts", ("24", "6")), ("drills", ("30", "4")),
    ]  # fmt: skip
    assert "about 34 minutes of inf; nothing was built or run" in said
    assert list(tmp_path.iterdir()) == []


def test_what_each_stage_does_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    _, said = dry(capsys)
    for words in ("the tests marked", "emoji in fp32 and", "random:sd15 in", "old precision", "TensorRT: as", "torch.compile",
                  "40 kinds of"):  # fmt: skip
        assert words in said, words


def test_the_first_stages_fit_ten_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    assert BUDGET == 10
    shown, said = dry(capsys)
    assert [name for name, (begins, _) in shown.items() if begins != "-"] == ["driver", "correct", "rtx"]
    assert "left out: rtx-old: takes about 3 minutes; left of the budget of 10: 1" in said
    assert "about 9 minutes of 10" in said


def test_what_does_not_fit_leaves_room_for_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    shown, _ = dry(capsys, "--budget", "17")
    assert [name for name, (begins, _) in shown.items() if begins == "-"] == ["tensorrt", "layouts", "drills"]
    assert shown["baselines"] == ("12", "4")


def test_stages_that_are_named_come_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    shown, _ = dry(capsys, "--only", "drills,rtx")
    assert list(shown.items()) == [("rtx", ("0", "4")), ("drills", ("4", "4"))]


def test_a_source_that_is_named_is_that_of_all_stages(capsys: pytest.CaptureFixture[str]) -> None:
    shown, said = dry(capsys, "--source", "mini", "--precision", "fp16", "--budget", "inf")
    assert [takes for _, takes in shown.values()] == ["2", "3", "1", "1", "2", "2", "2", "4"]
    assert said.count("mini in") == 5
    assert "sd15" not in said


@pytest.mark.parametrize(
    ("only", "stages"),
    [
        ("start", {"rtx": ("start",), "rtx-old": ("start",), "tensorrt": ("start",)}),
        ("segments", {"correct": ("segments",)}),
        ("rtx,start", {"rtx": ("start",)}),
        ("driver,rtx,plans", {"driver": (), "rtx": ("plans",)}),
        ("baselines", {"baselines": ()}),
        ("correct", {"correct": ("segments", "plans")}),
    ],
)
def test_words_choose_stages_and_what_they_measure(only: str, stages: dict[str, tuple[str, ...]]) -> None:
    assert {stage.name: stage.parts for stage in parse(["--only", only], "").stages} == stages


def test_engines_that_are_not_installed_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.stages.find_spec", lambda name: None if name == "tensorrt" else object())
    _, said = dry(capsys)
    assert "engine tensorrt is not installed here and would be left out" in said
    assert "engine tensorrt-rtx is not" not in said


def test_a_target_that_is_none_is_refused_before_anything_is_done() -> None:
    assert parse(["--targets", "sm89,sm120"], "").targets == ["sm89", "sm120"]
    with pytest.raises(UserError, match="--targets: 'xyz' is no compute capability; write such as sm89"):
        parse(["--targets", "sm89,xyz"], "")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--size", "0x0"], r"size 0x0: height and width must be multiples"),
        (["--source", "nowhere"], r"unknown source 'nowhere': no such folder"),
        (["--variant", ""], r"unknown variant ''; choose from: original"),
    ],
)
def test_what_cannot_be_built_is_refused_before_the_first_stage(given, message):
    with pytest.raises(UserError, match=message):
        parse(["--dry-run", "--only", "correct", *given], "")


def test_onnx_runtime_without_cuda_is_said_to_be_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed is not enough: the package without CUDA is what the project has."""
    monkeypatch.setattr("benchmarks.gpu.stages._installed", lambda package: False)
    _, said = dry(capsys)
    assert "engine onnxruntime has no CUDA here and would be left out on a card" in said
    assert "make gpu-check does not install onnxruntime-gpu" in said
    assert "no CUDA" not in dry(capsys, "--engines", "torch")[1]
    monkeypatch.setattr("benchmarks.gpu.stages._installed", lambda package: True)
    assert "no CUDA" not in dry(capsys)[1]
