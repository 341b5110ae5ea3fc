"""The figures of conditional convolutions: ratios of one round, and what the assembled twin's blocks add up to."""

import json
import sys
from pathlib import Path

import pytest

import tuning
from benchmarks import condconv, condconv_forms

RESULTS = json.loads(Path("benchmarks/results/condconv.json").read_text())
PAGE = Path("docs/condconv.md").read_text()


def test_ratios_are_taken_within_a_round(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.process_time", lambda: now[0])
    slow_round = [1, 1, 10, 1]  # the first warms up; everything takes ten times as long in the third

    def takes(seconds):
        rounds = iter(slow_round)

        def run():
            now[0] += seconds * next(rounds)

        return run

    figures = condconv_forms.ratios({"plain": takes(2.0), "other": takes(3.0)}, "plain", 3)
    assert figures["plain"] == {"ratio": 1, "low": 1, "high": 1, "ms": 2000}
    assert figures["other"] == {"ratio": 1.5, "low": 1.5, "high": 1.5, "ms": 3000}


def test_blocks_without_experts_count_as_the_twins() -> None:
    def rows(**ms):
        return [{"router": router, "batch": batch, "ms": batch * value} for batch in (1, 2) for router, value in ms.items()]

    sums = condconv._sums({"down.0": rows(assembled=10, timestep=12), "mid": rows(assembled=30)}, ["assembled", "timestep"])
    assert sums == [
        {"router": "assembled", "batch": 1, "ratio": 1, "ms": 40},
        {"router": "timestep", "batch": 1, "ratio": 1.05, "ms": 42},
        {"router": "assembled", "batch": 2, "ratio": 1, "ms": 80},
        {"router": "timestep", "batch": 2, "ratio": 1.05, "ms": 84},
    ]


def test_macs_of_the_embedded_unet_are_those_of_its_own_text() -> None:
    """As in the table of variants, which bundles' manifests give."""
    students = condconv.students(tuning.load_unet(Path("models/mini/unet")), condconv.text_length(Path("models/mini")))
    counted = {name: sum(unit.macs for unit in student.units) for name, student in students.items()}
    rows = json.loads(Path("benchmarks/results/variants.json").read_text())["rows"]
    assert counted["assembled"] == rows["assembled"]["macs"]
    assert counted["timestep"] == rows["condconv"]["macs"]


def test_without_tensorrt_rtx_there_is_no_count_of_its_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert condconv_forms.rtx_layers(tmp_path / "any.onnx") is None


@pytest.mark.parametrize("form", ["scan", "slices", "experts", "grouped"])
def test_the_page_shows_the_committed_figures_of_a_form(form: str) -> None:
    rows = [row for row in RESULTS["layers"] if row["form"] == f"features, {form}"]
    times, layers = [row["ratio"] for row in rows], sorted({str(row["rtx_layers"]) for row in rows})
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| `{form}`:"))
    assert f"| {min(times):.2f} to {max(times):.2f} | {' or '.join(layers)}" in line


def test_parts_that_are_not_measured_again_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "found.json"
    for part in condconv.PARTS:
        monkeypatch.setitem(condconv.PARTS, part, lambda rounds, threads, folder: [])
    condconv.main(["--parts", "layers", "--out", str(out)])
    row = {"side": 32, "form": "plain"}
    out.write_text(json.dumps(json.loads(out.read_text()) | {"layers": [row]}))
    monkeypatch.setitem(condconv.PARTS, "whole", lambda rounds, threads, folder: {"macs": {}, "time": []})
    condconv.main(["--parts", "whole", "--out", str(out)])
    assert json.loads(out.read_text())["layers"] == [row]
    condconv.main(["--parts", "whole", "--rounds", "1", "--out", str(out)])
    assert "layers" not in json.loads(out.read_text())
