"""The command that compares this project with its peers: the form of its results, never the times in them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from benchmarks import run_trt
from benchmarks.end_to_end.figures import fault
from benchmarks.end_to_end.measure import Log, measure
from benchmarks.end_to_end.prepare import _write_words
from benchmarks.end_to_end.references import References
from benchmarks.end_to_end.rows import Settings, chosen_peers, rows_of
from benchmarks.end_to_end.worker import SubjectError
from benchmarks.peers import PEERS
from benchmarks.peers.serve import Call, _exported
from engines.errors import UserError
from tests.support import remembered
from tests.support.commands import assert_refused, command
from tests.support.sources import save_source

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told before a run need not be measured for each test."""
    monkeypatch.setattr("exporter.graph.graph.infer_shapes_and_macs", remembered.infer_shapes_and_macs)


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The script itself, as people start it."""
    command = [sys.executable, ROOT / "benchmarks" / "run_trt.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=300, **options)


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    log = Log(path, {"steps": 4}, resume=False)
    log.add({"row": "a", "parts": {"unet": 1.0}})
    whole = path.read_text()
    path.write_text(whole + '{"row": "b", "parts": {"unet": 1.0}')  # as a kill or a full disk leaves it
    again = Log(path, {"steps": 4}, resume=True)
    assert [sample["row"] for sample in again.samples] == ["a"]
    again.add({"row": "b"})
    assert [sample["row"] for sample in Log(path, {"steps": 4}, resume=True).samples] == ["a", "b"]
    with pytest.raises(ValueError, match="settings are others"):
        Log(path, {"steps": 5}, resume=True)


def test_a_base_row_that_fails_ends_its_rows_alone(tmp_path: Path) -> None:
    """A later subject is measured all the same, and a resumed run does not begin with what failed."""
    settings = run_trt._settings(run_trt._parser().parse_args(["--device", "cpu", "--plans", "full,skip:2", "--peers", "none"]))
    base, row = rows_of(settings, {})[:2]

    class Failing:
        about = {"load_seconds": 0.0}  # noqa: RUF012

        def picture(self, call: Any) -> Any:
            raise SubjectError("out of memory")

    log = Log(tmp_path / "run.jsonl", {}, resume=False)
    call: Any = Call("a cat", 2, 3.0, 0, 64, 64)
    started: list[Any] = []

    def start(row: Any) -> Any:
        started.append(row)
        return nullcontext(Failing())

    for _ in range(2):
        nothing = References(tmp_path, "run", base, resume=True)
        measure([base, row], [base], start, call, settings, log, nothing, lambda *told: None)
    assert len(started) == 1
    errors = {sample["row"]: sample["error"] for sample in log.samples if "error" in sample}
    assert errors == {"original full": "out of memory", "original skip:2": "original full failed: out of memory"}


def test_a_plan_that_switches_needs_its_unets() -> None:
    given = ["--device", "cpu", "--plans", "full,switch:0.4", "--variants", "original"]
    with pytest.raises(UserError, match="plan switch:0.4 runs the UNet assembled; name it too: --variants original,assembled"):
        run_trt._settings(run_trt._parser().parse_args(given))


def test_a_quick_run_or_fewer_steps_do_not_take_the_place_of_a_whole_one() -> None:
    given = (["--device", "cpu", *more] for more in ([], ["--steps", "10"]))
    whole, fewer = (run_trt._settings(run_trt._parser().parse_args(each)) for each in given)
    assert run_trt._file_name(whole).endswith("-fp32-b1-t1")
    names = [run_trt._file_name(whole), run_trt._file_name(whole, quick=True), run_trt._file_name(fewer)]
    assert [name.removeprefix(names[0]) for name in names] == ["", "-quick", "-10-steps"]


@pytest.mark.parametrize(("error", "wrong"), [(1e-9, False), (1.0, True), (float("nan"), True)])
def test_what_claims_the_base_rows_output_has_to_have_it(error: float, wrong: bool) -> None:
    assert bool(fault({"same_output": True, "latents_error": error})) is wrong
    assert bool(fault({"same_output": False, "latents_error": 0.0, "deviation": error})) is wrong
    assert not fault({"same_output": False, "latents_error": error, "deviation": None})


@pytest.mark.slow
@pytest.mark.shared_pieces
@pytest.mark.usefixtures("warm_commands")
def test_every_row_is_measured_or_says_why_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model, ours and a peer; a second run resumes and measures nothing again."""
    source = save_source(tmp_path / "tiny")
    given = [
        "--source", source, "--variants", "original", "--plans", "full,deepcache:2", "--steps", "4", "--rounds", "2",
        "--peers", "diffusers,diffusers-channels-last", "--device", "cpu", "--out", tmp_path / "out", "--work", tmp_path / "work",
    ]  # fmt: skip
    # In this process: a process of its own would only import everything again. Those of the rows are processes nonetheless.
    in_this_process = command(run_trt.main, capfd, monkeypatch)
    done = in_this_process(*given)
    assert done.code == 0, done.out + done.err
    (path,) = (tmp_path / "out").glob("*.json")
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["original full", "original deepcache:2", "diffusers", "diffusers-channels-last"]
    assert rows["diffusers-channels-last"]["reason"] == "not available: it runs on cuda only"
    full, plan, diffusers = (rows[name] for name in ("original full", "original deepcache:2", "diffusers"))
    assert full["ratio"] == 1
    assert full["identical"]
    assert full["macs_ratio"] == 1 > plan["macs_ratio"] > 0
    assert {kind: step["count"] for kind, step in plan["steps"].items()} == {"key": 2, "inherit": 2}
    assert diffusers["same_output"]
    assert diffusers["latents_error"] < 1e-3 < plan["latents_error"], "the peer computes what full does, the plan does not"
    for row in (full, plan, diffusers):
        assert 0 < row["low"] <= row["p50"] <= row["p95"] <= row["high"]
        parts = row["unet_seconds"] + row["text_seconds"] + row["vae_seconds"]
        assert 0 < parts <= row["high"]
        assert row["peak_mb"] > 50
    (table,) = (tmp_path / "out").glob("*.csv")
    lines = list(csv.DictReader(table.open()))
    assert [line["name"] for line in lines] == list(rows)
    assert float(lines[1]["inherit_step_seconds"]) == plan["steps"]["inherit"]["seconds"]
    assert float(lines[0]["pictures_per_second"]) == full["pictures_per_second"] == 1 / full["p50"]
    assert "torch" in diffusers["versions"]
    (page,) = (tmp_path / "out").glob("*.md")
    assert "- diffusers-channels-last: not available: it runs on cuda only" in page.read_text()
    timeline, plot = sorted((tmp_path / "out").glob("*.png"))
    assert timeline.name == f"{plot.stem}-timeline.png"
    for picture in (plot, timeline):
        with Image.open(picture) as image:
            assert image.width > 600

    again = in_this_process(*given, "--resume")
    assert again.code == 0, again.err
    assert any("round" in line for line in done.out)
    assert not any("round" in line for line in again.out)
    assert in_this_process(*given, "--resume", "--guidance-less").code == 2
    assert_refused(in_this_process(*[4 if part == "2" else part for part in given], "--resume"), "of another run")


def test_without_a_gpu_it_says_what_can_be_done() -> None:
    done = run("--device", "cuda")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "needs an NVIDIA GPU" in line
    for way in ("--device cpu", "--dry-run", "--build-only"):
        assert way in line
    assert done.stdout == ""


@pytest.mark.slow
def test_a_dry_run_builds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_trt.main(["--quick", "--device", "cpu", "--dry-run", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")])
    told = capsys.readouterr().out
    for row in ("original deepcache:3", "assembled full", "diffusers"):
        assert row in told
    assert "minutes to build" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "diffuser"], "unknown peer 'diffuser'; choose from: all, none, diffusers"),
        (["--engine", "tensorflow"], "unknown engine 'tensorflow'; choose from: onnxruntime"),
        (["--plans", "deepcash:3"], "deepcash"),
        (["--rounds", "0"], "--rounds 0 is too few; give 1 or more"),
    ],
)
def test_mistakes_are_told_before_anything_is_built(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run_trt.main([*arguments, "--device", "cpu", "--work", str(tmp_path / "work")])
    assert list(tmp_path.iterdir()) == []


def test_original_full_is_always_measured() -> None:
    settings = Settings(
        "mini", ("original",), ("full", "deepcache:3"), ("onnxruntime", "torch"), ("optimum-onnx", "torch-compile"), "cpu",
        "fp32", None, 20, 1, 5, 1, Path("work"),
    )  # fmt: skip
    rows = rows_of(settings, {"torch": "it is not here"})
    assert [(row.plan, row.engine) for row in rows if row.is_base] == [("full", "onnxruntime"), ("full", "torch")]
    assert {row.reason for row in rows if row.engine == "torch"} == {"it is not here"}
    assert chosen_peers("all") == tuple(PEERS)
    assert chosen_peers("none") == ()


@pytest.mark.slow
def test_quick_gives_way_to_what_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    run_trt.main(["--quick", "--device", "cpu", "--dry-run", "--peers", "none", "--plans", "full"])
    told = capsys.readouterr().out
    assert "assembled full" in told
    assert "diffusers" not in told
    assert "deepcache" not in told


def test_older_versions_of_transformers_find_the_tokenizers_words(tmp_path: Path) -> None:
    source = ROOT / "models" / "mini" / "tokenizer"
    shutil.copy(source / "tokenizer.json", tmp_path)
    _write_words(tmp_path)
    assert json.loads((tmp_path / "vocab.json").read_text()) == json.loads((source / "vocab.json").read_text())
    merges = [(folder / "merges.txt").read_text().splitlines() for folder in (tmp_path, source)]
    assert merges[0][1:] == [line for line in merges[1] if not line.startswith("#version")]


def test_an_adapters_files_are_written_once_and_whole(tmp_path: Path) -> None:
    folder, given = tmp_path / "pipeline", {"work": str(tmp_path / "work"), "height": 64}
    folder.mkdir()
    adapter = ModuleType("benchmarks.peers.copied")
    adapter.export = _copied  # type: ignore[attr-defined]
    assert _exported(adapter, folder, given) == tmp_path / "work" / "copied"
    (folder / "later").touch()
    assert list(_exported(adapter, folder, given).iterdir()) == []
    adapter.EXPORTED_FOR = ("height",)  # type: ignore[attr-defined]
    assert _exported(adapter, folder, given) == tmp_path / "work" / "copied-64"
    adapter.export = os.fspath  # type: ignore[attr-defined]
    adapter.__name__ = "benchmarks.peers.failing"
    with pytest.raises(TypeError):
        _exported(adapter, folder, given)
    assert not (tmp_path / "work" / "failing-64").exists()


def _copied(folder: Path, exported: Path, options: dict[str, Any]) -> None:
    shutil.copytree(folder, exported)
