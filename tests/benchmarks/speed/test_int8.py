"""Segments in int8: what they are calibrated on, what is quantised of them, and the table of what that does."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from rich.console import Console

import runtime
from benchmarks.quality.judge import MEASURES
from benchmarks.speed import int8, int8_times
from benchmarks.speed.full_size import export, measured_units, random_inputs
from benchmarks.speed.int8_bundles import (
    CONVOLUTIONS,
    PRODUCTS,
    VARIANTS,
    Feeds,
    Recording,
    Variant,
    counted,
    graph_of,
    quantised,
)
from engines import Bundle, UserError
from engines.bundle.names import NOISE, SAMPLE, TEXT, TIMESTEP
from engines.ort.engine import OnnxRuntime
from exporter.graph.partition import partition
from exporter.graph.unit_modules import SegmentModule
from runtime.plans.checks import check_runs
from tests.support.unets import small_unet

PLAN, STEPS = "deepcache:2", 4
SIZES = {"batch": 2, "height": 8, "width": 8}
OUTERMOST = "up.1-head"
"""The segment that runs at every step of the plan, and takes what the one before it made at the last key step."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small UNet, partitioned for the plan."""
    unet = small_unet("two stages", mid_block_type=None)
    units, features, modules = measured_units(unet, 8)
    parts = [
        (segment, SegmentModule([u for u in units if u.name in segment.units], modules, segment.inputs, segment.outputs))
        for segment in partition(units, None, [runtime.find_plan(PLAN)])
    ]
    return export(tmp_path_factory.mktemp("int8") / "fp32", unet, parts, units, features)


@pytest.fixture(scope="module")
def feeds(bundle: Bundle) -> Feeds:
    """What the segments are given in a call of the plan."""
    engine = Recording()
    network = runtime.LoadedBundle.load(bundle, engine)
    schedule = runtime.Schedule(runtime.find_plan(PLAN), {"one": network.manifest}, [900.0, 700.0, 500.0, 300.0])
    check_runs(schedule)
    executor = runtime.Executor({"one": network}, schedule)
    for number in range(STEPS):
        given = inputs(bundle, number)
        executor.step(number, given[SAMPLE], given[TIMESTEP], given[TEXT])
    return engine.feeds


@pytest.fixture(scope="module")
def in_int8(bundle: Bundle, feeds: Feeds, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Variant], Bundle]:
    """The bundle quantised as a variant says, made when it is first asked for. Not to be changed."""
    folder = tmp_path_factory.mktemp("quantised")
    made: dict[str, Bundle] = {}

    def of(variant: Variant) -> Bundle:
        if variant.name not in made:
            made[variant.name] = quantised(bundle, folder / str(len(made)), feeds, variant)
        return made[variant.name]

    return of


def inputs(bundle: Bundle, step: int) -> dict[str, torch.Tensor]:
    """Latents, timestep and text of a step."""
    given = random_inputs((SAMPLE, TIMESTEP, TEXT), bundle.manifest.features, SIZES)
    return given | {SAMPLE: given[SAMPLE] + step, TIMESTEP: torch.tensor([900.0 - 200 * step])}


@pytest.mark.slow
def test_segments_are_calibrated_on_what_the_plan_gives_them(bundle: Bundle, feeds: Feeds) -> None:
    assert {name: len(runs) for name, runs in feeds.items()} == {"stem": STEPS, "down.0-up.1": STEPS // 2, OUTERMOST: STEPS}
    for number, run in enumerate(feeds["stem"]):
        assert np.array_equal(run[SAMPLE], inputs(bundle, number)[SAMPLE].numpy())
        assert run[TIMESTEP] == 900 - 200 * number
    (inherited,) = set(feeds[OUTERMOST][0]) - {"stem", "time", TEXT}
    taken = [run[inherited] for run in feeds[OUTERMOST]]
    assert np.array_equal(taken[0], taken[1])
    assert np.array_equal(taken[2], taken[3])
    assert not np.array_equal(taken[1], taken[2])
    network = runtime.LoadedBundle.load(bundle, OnnxRuntime(device="cpu"))
    assert np.array_equal(taken[2], network.compute(inherited, inputs(bundle, 2)).numpy())


def quantisers(bundle: Bundle) -> dict[str, Counter[str]]:
    """How many nodes of each kind the graphs have that the engine runs."""
    graphs = {each.name: onnx.load(graph_of(bundle, each), load_external_data=False).graph for each in bundle.manifest.segments}
    return {name: Counter(node.op_type for node in graph.node) for name, graph in graphs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_quantised_segments_hold_quantised_operators(
    bundle: Bundle, in_int8: Callable[[Variant], Bundle], variant: Variant
) -> None:
    made = in_int8(variant)
    before, after = quantisers(bundle), quantisers(made)
    for segment in made.manifest.segments:
        name, graph = segment.name, graph_of(made, segment)
        assert before[name]["QuantizeLinear"] == 0
        taken = variant.ends or name not in {"stem", OUTERMOST}
        here = {op: taken and op in variant.operators and before[name][op] > 0 for op in CONVOLUTIONS + PRODUCTS}
        assert (after[name]["QuantizeLinear"] > 0) == any(here.values())
        for operator, chosen in here.items():
            number = before[name][operator]
            assert counted(graph, [operator]) == ((number, 0) if chosen else (0, number))
        # What attention is made of and what is added up are as they were.
        assert after[name]["MultiHeadAttention"] == before[name]["MultiHeadAttention"]
        assert after[name]["Add"] == before[name]["Add"]
    weights = [w for s in made.manifest.segments for w in onnx.load(graph_of(made, s)).graph.initializer]
    scales = [onnx.numpy_helper.to_array(w) for w in weights if w.name.endswith(".weight_scale")]
    assert scales, "of convolutions or of the time embedding's products"
    assert all(scale.ndim == 1 and len(np.unique(scale)) > 1 for scale in scales), "one for each output channel"


@pytest.mark.slow
def test_int8_predicts_nearly_what_fp32_does(bundle: Bundle, in_int8: Callable[[Variant], Bundle]) -> None:
    made, engine = in_int8(VARIANTS[0]), OnnxRuntime(device="cpu")
    whole, rounded = (
        runtime.LoadedBundle.load(each, engine).compute(NOISE, inputs(bundle, 0)) for each in (bundle, made)
    )  # the first step is one that was calibrated on
    error = float((whole - rounded).norm() / whole.norm())
    assert 1e-4 < error < 0.1
    assert bundle.folder != made.folder
    assert sorted(path.name for path in (bundle.folder / "segments").iterdir() if "int8" in path.name) == []


@pytest.mark.slow
def test_steps_and_segments_are_timed_in_int8_and_in_fp32(
    bundle: Bundle, in_int8: Callable[[Variant], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = int8_times.step_times({"fp32": bundle, "int8": in_int8(VARIANTS[0])}, 1)
    assert list(steps) == ["fp32", "int8"]
    assert steps["fp32"]["ratio"] == 1
    assert steps["int8"]["ms"] > 0
    monkeypatch.setattr(int8_times, "random_unet", lambda source: small_unet("two stages", mid_block_type=None))
    units = ("up.1.layer.0.resnet", "up.1.layer.0.attention")
    found = int8_times.segment_times("random:sd15", units, 8, 1, tmp_path / "parts")
    assert {name: list(kinds) for name, kinds in found.items()} == {unit: ["fp32", "int8"] for unit in units}
    for unit in units:
        graph = tmp_path / "parts" / "int8" / "segments" / f"{unit}.int8.onnx"
        count, rest = counted(graph, CONVOLUTIONS + PRODUCTS)
        assert (count > 0, rest) == (True, 0)


def quality_row(psnr: float | None, beside: str = "fp32") -> dict[str, Any]:
    share = {"right": 8, "of": 16, "share": 0.5, "low": 0.28, "high": 0.72}
    near = {"psnr": psnr, "psnr_low": psnr and psnr - 1, "psnr_high": psnr and psnr + 1, "psnr_p10": psnr, "ssim": 0.99}
    over = {name: {"mean": -0.0625, "low": -0.18, "high": 0.06} for name in MEASURES}
    counts = {"int8": 0 if psnr is None else 5, "fp32": 5 if psnr is None else 0}
    return {"operators": counts, "beside": beside, "likeness": near, "over": over} | dict.fromkeys(MEASURES, share)


QUALITY = {"settings": {}, "rows": {"fp32": quality_row(None), "int8": quality_row(36.42)}}
TIMES = {"ratio": 0.414, "low": 0.4, "high": 0.45, "ms": 3.0}
TIME = {
    "settings": {},
    "step": {"fp32": TIMES | {"ratio": 1, "low": 1, "high": 1}, "int8": TIMES},
    "segments": {"up.3.layer.0.resnet": {"fp32": TIMES, "int8": TIMES | {"ratio": 0.78}}},
}


def shown(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The cells of the table's rows, without its head."""
    Console(width=180).print(int8.table(found))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    head = next(number for number, line in enumerate(lines) if line.startswith("──"))
    return [re.split(r" {3,}", line) for line in lines[head + 1 :] if line]


def test_a_row_has_what_was_measured_of_a_variant(capsys: pytest.CaptureFixture[str]) -> None:
    fp32, whole, segment = shown({"quality": QUALITY, "time": TIME}, capsys)
    share, over = "50.0 % (28 to 72)", "-6.2 (-18.0 to +6.0)"
    assert fp32 == ["fp32", "0 of 5", share, share, "fp32", "same", over, "1.00 (1.00 to 1.00)"]
    assert whole == ["int8", "5 of 5", share, share, "fp32", "36.4 (35.4 to 37.4)", over, "0.41 (0.40 to 0.45)"]
    assert segment == ["up.3.layer.0.resnet, int8", *["-"] * 6, "0.78 (0.40 to 0.45)"]


def test_a_row_has_dashes_for_what_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert [row[-1] for row in shown({"quality": QUALITY}, capsys)] == ["-", "-"]
    assert [row[1:-1] for row in shown({"time": TIME}, capsys)] == [["-"] * 6] * 3


def measuring(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The command without what takes time: a bundle that fits, nothing recorded, nothing quantised, figures as above."""
    made = argparse.Namespace(folder=folder, manifest=argparse.Namespace(source="emoji", precision="fp32"))
    monkeypatch.setattr(Bundle, "open", lambda path: made)
    monkeypatch.setattr(int8, "record", lambda *given, **options: {})
    monkeypatch.setattr(int8, "quantised", lambda bundle, folder, feeds, variant: made)
    monkeypatch.setattr(int8, "_quality", lambda bundles, options: dict(QUALITY))
    monkeypatch.setattr(int8, "_time", lambda bundles, options: dict(TIME) | {"rounds": options.rounds})


def test_a_part_that_is_not_measured_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring(monkeypatch, tmp_path)
    out = tmp_path / "int8.json"
    int8.main(["--parts", "quality", "--out", str(out)])
    first = json.loads(out.read_text())
    assert set(first) == {"quality"}
    assert set(first["quality"]) == {"settings", "rows", "machine", "versions"}
    int8.main(["--parts", "time", "--rounds", "3", "--out", str(out)])
    int8.main(["--parts", "time", "--rounds", "4", "--out", str(out)])
    second = json.loads(out.read_text())
    assert list(second) == ["quality", "time"]
    assert second["quality"] == first["quality"]
    assert second["time"]["rounds"] == 4


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({"precision": "fp16"}, [], "is fp16: give one that was built with --precision fp32"),
        ({"source": "mini"}, [], "is of mini, which the reader cannot judge"),
        ({}, ["--parts", "quality,speed"], "got 'speed'; choose from quality, time"),
        ({}, ["--pictures", "0"], "--pictures 0: give 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    changes: dict[str, str], options: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring(monkeypatch, tmp_path)
    vars(Bundle.open(Path())).update(manifest=argparse.Namespace(**{"source": "emoji", "precision": "fp32"} | changes))
    with pytest.raises(UserError, match=says):
        int8.main([*options, "--out", str(tmp_path / "int8.json")])
    assert not (tmp_path / "int8.json").exists()


def test_a_file_that_holds_no_figures_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring(monkeypatch, tmp_path)
    out = tmp_path / "int8.json"
    out.write_text("no figures")
    with pytest.raises(UserError, match="holds no figures"):
        int8.main(["--parts", "time", "--out", str(out)])
    assert out.read_text() == "no figures"
