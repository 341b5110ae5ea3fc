"""The figures of conditional convolutions: ratios of one round, and what the assembled twin's blocks add up to."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tuning
from benchmarks.condconv import costs, forms, page
from exporter.graph.condconv import FORMS
from tuning.surgery.condconv import CondConv2d

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

    figures = forms.ratios({"plain": takes(2.0), "other": takes(3.0)}, "plain", 3)
    assert figures["plain"] == {"ratio": 1, "low": 1, "high": 1, "ms": 2000}
    assert figures["other"] == {"ratio": 1.5, "low": 1.5, "high": 1.5, "ms": 3000}


def test_blocks_without_experts_count_as_the_twins() -> None:
    def rows(**ms):
        return [{"router": router, "batch": batch, "ms": batch * value} for batch in (1, 2) for router, value in ms.items()]

    sums = costs._sums({"down.0": rows(assembled=10, timestep=12), "mid": rows(assembled=30)}, ["assembled", "timestep"])
    assert sums == [
        {"router": "assembled", "batch": 1, "ratio": 1, "ms": 40},
        {"router": "timestep", "batch": 1, "ratio": 1.05, "ms": 42},
        {"router": "assembled", "batch": 2, "ratio": 1, "ms": 80},
        {"router": "timestep", "batch": 2, "ratio": 1.05, "ms": 84},
    ]


@pytest.mark.slow
def test_macs_of_the_embedded_unet_are_those_of_its_own_text() -> None:
    """As in the table of variants, which bundles' manifests give."""
    students = costs.students(tuning.load_unet(Path("models/emoji/unet")), costs.text_length(Path("models/emoji")))
    counted = {name: sum(unit.macs for unit in student.units) for name, student in students.items()}
    rows = json.loads(Path("benchmarks/results/variants.json").read_text())["rows"]
    assert counted["assembled"] == rows["assembled"]["macs"]
    assert counted["timestep"] == rows["condconv"]["macs"]


def test_without_tensorrt_rtx_there_is_no_count_of_its_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert forms.rtx_layers(tmp_path / "any.onnx") is None


@pytest.mark.parametrize("form", ["scan", "slices", "experts", "grouped"])
def test_the_page_shows_the_committed_figures_of_a_form(form: str) -> None:
    rows = [row for row in RESULTS["layers"] if row["form"] == f"features, {form}"]
    times, layers = [row["ratio"] for row in rows], sorted({str(row["rtx_layers"]) for row in rows})
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| `{form}`:"))
    assert f"| {min(times):.2f} to {max(times):.2f} | {' or '.join(layers)}" in line


def test_the_pages_figures_are_the_committed_ones(tmp_path: Path) -> None:
    """And `python -m benchmarks.condconv.costs --page` puts them there, whatever was there before."""
    doc = tmp_path / "condconv.md"
    figures = [part for part in PAGE.split("\n\n") if part.startswith(("| form", "| what", "The goal was"))]
    assert len(figures) == 3
    old = PAGE
    for part in figures:
        old = old.replace(part, part[:30])
    doc.write_text(old)
    costs.main(["--page", "--doc", str(doc)])
    assert doc.read_text() == PAGE


def test_layers_in_the_pages_words_are_the_committed_ones() -> None:
    layers = {row["form"]: row["rtx_layers"] for row in RESULTS["layers"]}
    words = " ".join(PAGE.split())
    outside = f"({layers['timestep, outside']} where the kernel is mixed outside)"
    by_timestep = f"a convolution is {layers['timestep']} layers with the timestep router {outside}"
    assert f"{by_timestep} and {layers['features, scan']} with the features router" in words


def _found(mini: float, sd15: float) -> dict[str, Any]:
    rows = [{"router": router, "batch": batch} for router in ("timestep", "features") for batch in (1, 2)]
    ranges = {"ratio": mini, "low": mini - 0.1, "high": mini + 0.1}
    layers = [
        {"form": form, "side": side, "batch": batch, "ratio": 1.2, "low": 1.1, "high": 1.3, "rtx_layers": 29}
        for form in ("timestep", *(f"features, {form}" for form in FORMS))
        for side in (32, 64)
        for batch in (1, 2)
    ]
    macs = {"timestep": 1.001}
    return {
        "settings": {"threads": 1},
        "layers": layers,
        "whole": {"side": 8, "macs": macs, "time": [row | ranges for row in rows]},
        "blocks": {"side": 64, "macs": macs, "sum": [row | {"ratio": sd15} for row in rows]},
    }


@pytest.mark.parametrize(
    ("mini", "sd15", "says"),
    [
        (1.2, 1.02, "widths meets it with both, `mini`'s UNet misses it with both"),
        (1.05, 1.06, "widths misses it with both, `mini`'s UNet meets it with both"),
    ],
)
def test_goals_stand_beside_the_figures(mini: float, sd15: float, says: str) -> None:
    assert says in " ".join(page.goals(_found(mini, sd15)).split())


def test_the_features_routers_goal_is_for_batch_1() -> None:
    found = _found(1.2, 1.02)
    for row in found["whole"]["time"]:
        if (row["router"], row["batch"]) == ("features", 1):
            row["ratio"] = 1.049
    assert "UNet meets it with the features router only" in " ".join(page.goals(found).split())
    lines = page.costs(found).splitlines()
    assert lines[6] == "| `mini`'s UNet, 8 x 8 latents | timestep | 1.20 (1.10 to 1.30) | 1.20 (1.10 to 1.30) | missed |"
    assert lines[7] == "|  | features | 1.05 (1.10 to 1.30) | 1.20 (1.10 to 1.30) | met |"
    assert lines[8].endswith("sum of all blocks | timestep | 1.02 | 1.02 | met |")


def test_kernels_that_are_inherited_are_counted() -> None:
    teacher = tuning.load_unet(Path("models/mini/unet"))
    student = tuning.assemble(teacher, tuning.recipe("condconv"))
    theirs = [module.weight for module in teacher.modules() if isinstance(module, nn.Conv2d)]

    def known(kernel: Tensor) -> bool:
        return any(kernel.shape == weight.shape and torch.equal(kernel, weight) for weight in theirs)

    layers = {name: module for name, module in student.named_modules() if isinstance(module, CondConv2d)}
    assert len(layers) == 8
    assert all(known(layer.kernels[0]) for layer in layers.values())
    random = {name: sum(not known(kernel) for kernel in layer.kernels) for name, layer in layers.items()}
    inherited = sum(len(layer.kernels) - 1 - random[name] for name, layer in layers.items())
    words = " ".join(PAGE.split())
    assert f"{len(layers)} kernels of their own, {inherited} of removed ResNets and {sum(random.values())} random ones" in words
    assert sum(count for name, count in random.items() if name.startswith("down_blocks.0.")) == 12


def test_parts_that_are_not_measured_again_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "found.json"
    for part in costs.PARTS:
        monkeypatch.setitem(costs.PARTS, part, lambda rounds, threads, folder: [])
    costs.main(["--parts", "layers", "--out", str(out)])
    row = {"side": 32, "form": "plain"}
    out.write_text(json.dumps(json.loads(out.read_text()) | {"layers": [row]}))
    monkeypatch.setitem(costs.PARTS, "whole", lambda rounds, threads, folder: {"macs": {}, "time": []})
    costs.main(["--parts", "whole", "--out", str(out)])
    assert json.loads(out.read_text())["layers"] == [row]
    costs.main(["--parts", "whole", "--rounds", "1", "--out", str(out)])
    assert "layers" not in json.loads(out.read_text())
