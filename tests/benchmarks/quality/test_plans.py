"""The benchmark of plans: fronts, likeness, labels that can be read, and a run that goes on where it was broken off."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import runtime
from benchmarks.quality import plans, plans_plot
from benchmarks.quality.judge import wilson
from engines import UserError
from runtime.plans.presets import find_plan
from tuning.ranking.labels import box_of

ROWS: list[dict[str, Any]] = [
    {"plan": "full", "time": 1.0, "same": 1.0, "psnr": None},
    {"plan": "a", "time": 0.5, "same": 1.0, "psnr": 30.0},
    {"plan": "b", "time": 0.5, "same": 0.9, "psnr": 31.0},
    {"plan": "c", "time": 0.7, "same": 0.95, "psnr": 29.0},
    {"plan": "d", "time": 0.3, "same": 0.8, "psnr": 20.0},
]


def test_the_front_is_what_no_plan_beats_in_both() -> None:
    assert plans_plot.front(ROWS, "same") == ["d", "a"]
    assert plans_plot.front(ROWS, "psnr") == ["d", "b", "full"]


def test_the_plans_are_many_and_known() -> None:
    assert len(plans.PLANS) >= 20
    assert len({find_plan(name).name for name in plans.PLANS}) == len(plans.PLANS)
    assert {name.partition(":")[2] for name in plans.PLANS} >= {"2", "3", "4", "5", "6"}
    assert set(plans.GRID) <= {*plans.PLANS, *plans.CONTROLS}
    assert plans.GRID[-1] == "skip:10"  # three evaluations: it fails for everyone to see


def test_plan_files_are_rows() -> None:
    found = {find_plan(path).name: path for path in plans.FOUND}
    assert [find_plan(path).found is not None for path in plans.FOUND] == [True] * 3
    assert plans.plan_and_steps("found-0.417", 20, found) == (Path("benchmarks/results/front/found-0.417.json"), 20)
    assert set(found).isdisjoint(plans.PLANS)


def picture(value: int, size: int = 16) -> Image.Image:
    return Image.fromarray(np.full((size, size, 3), value, np.uint8))


def test_likeness() -> None:
    reference = [picture(100), picture(50)]
    alike = plans.likeness(reference, reference)
    assert (alike["psnr"], alike["psnr_low"], alike["ssim"]) == (None, None, 1.0)
    figures = plans.likeness([picture(100), picture(60)], reference)
    # Only the one that differs counts, by 10 levels of 255 in every pixel.
    assert figures["psnr"] == pytest.approx(20 * np.log10(255 / 10), abs=0.01)
    assert 0.9 < figures["ssim"] < 1
    two = plans.likeness([picture(110), picture(60), picture(70)], [*reference, picture(50)])
    decibels = 20 * np.log10(255 / np.array([10, 10, 20]))
    assert two["psnr"] == pytest.approx(decibels.mean(), abs=0.01)
    assert two["psnr_high"] - two["psnr_low"] == pytest.approx(2 * 1.96 * decibels.std() / np.sqrt(3), abs=0.02)


def test_intervals_of_shares() -> None:
    """Figures of Brown, Cai and DasGupta's form of Wilson's interval, worked out by hand."""
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    low, high = wilson(500, 500)
    assert (low, high) == pytest.approx((0.9924, 1.0), abs=1e-4)


def test_a_front_is_not_drawn_through_noise() -> None:
    rows = [
        {"plan": "cheap", "time": 0.3, "same": 0.95, "same_low": 0.93, "same_high": 0.97},
        {"plan": "no better", "time": 0.4, "same": 0.97, "same_low": 0.95, "same_high": 0.98},
        {"plan": "better", "time": 0.5, "same": 0.99, "same_low": 0.981, "same_high": 1.0},
    ]
    assert plans_plot.front(rows, "same") == ["cheap", "better"]
    # What is on no front itself counts all the same: its interval reaches up to that of the dearer one.
    rows[1]["same_high"] = 0.985
    assert plans_plot.front(rows, "same") == ["cheap"]


def test_controls_run_all_with_fewer_steps() -> None:
    assert [plans.plan_and_steps(name, 20) for name in ("12 steps", "skip:2")] == [("full", 12), ("skip:2", 20)]
    assert all(plans.plan_and_steps(name, 20)[0] == "full" for name in plans.CONTROLS)


def test_labels_cover_neither_each_other_nor_a_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    generator = np.random.default_rng(0)
    rows = [
        {"plan": name, "time": 1 / (1 + generator.integers(0, 8) / 4), "same": 1 - generator.integers(0, 4) / 500}
        for name in plans.PLANS
    ]
    rows = [row | {"psnr": 20 + 10 * float(row["time"])} for row in rows]  # type: ignore[arg-type]
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    plans_plot.plot(rows, "title", tmp_path / "plot.png")
    figure = pyplot.gcf()
    monkeypatch.undo()
    for axis in figure.axes[:2]:
        boxes = [box_of(note) for note in axis.texts]
        assert len(boxes) == len(rows)
        overlapping = [(i, j) for i in range(len(boxes)) for j in range(i) if boxes[i].overlaps(boxes[j])]
        assert overlapping == []
    pyplot.close(figure)
    with Image.open(tmp_path / "plot.png") as drawn:
        assert drawn.width > 1000


def test_what_is_kept_is_read_again_but_for_a_line_that_was_cut_off(tmp_path: Path) -> None:
    kept = plans.RunFolder(tmp_path / "work", {"rounds": 2, "plans": ("a", "b")})
    kept.add("rounds", {"a": [1, 2.5]})
    kept.add("rounds", {"a": [1, 3.5]})
    kept.put("block:3", [picture(7)])
    path = tmp_path / "work" / "rounds.jsonl"
    path.write_text(path.read_text() + '{"a": [1, 4')
    again = plans.RunFolder(tmp_path / "work", {"rounds": 2, "plans": ("a", "b")})
    assert again.lines("rounds") == [{"a": [1, 2.5]}, {"a": [1, 3.5]}]
    assert again.lines("nothing") == []
    assert again.pictures("block:3")[0].tobytes() == picture(7).tobytes()
    with pytest.raises(UserError, match="holds a run with other settings.*choose another --work"):
        plans.RunFolder(tmp_path / "work", {"rounds": 3, "plans": ("a", "b")})


class Stopped(Exception):
    """The run is killed."""


@pytest.mark.slow
def test_a_run_that_was_broken_off_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    calls: list[str] = []
    plotted: list[tuple[list[str], Path]] = []
    network = SimpleNamespace(manifest=SimpleNamespace(key="k"))
    manifest = SimpleNamespace(source="emoji")
    pipeline = SimpleNamespace(networks={"original": network}, manifest=manifest, schedule=lambda plan, timesteps, guided: None)

    def cost(pipeline: Any, plan: str, seed: int, options: Any) -> tuple[int, float]:
        calls.append(f"{plan} {seed}")
        return 100, 1.0 if plan == "full" else 0.5

    def drawn(bundle: Path, prompts: list[str], plan: str | Path, **options: Any) -> list[Image.Image]:
        plan = str(plan)
        calls.append(plan)
        if plan == "block:4" and calls.count(plan) == 1:
            raise Stopped
        return [picture(len(plan), 64) for _ in prompts]

    monkeypatch.setattr(runtime, "load", lambda bundle: pipeline)
    monkeypatch.setattr(plans, "_cost", cost)
    monkeypatch.setattr(plans, "draw_prompts", drawn)
    monkeypatch.setattr(plans, "plot", lambda rows, title, path: plotted.append(([row["plan"] for row in rows], path)))
    outputs = {"--out": "plans.csv", "--plot": "plans.png", "--grid": "grid.png", "--work": "work"}
    arguments = ["--count", "8", "--rounds", "2", *(part for o, n in outputs.items() for part in (o, str(tmp_path / n)))]
    with pytest.raises(Stopped):
        plans.main(arguments)
    done = len(calls)
    plans.main(arguments)
    # Nothing is measured twice but the plan at which it stopped.
    files = list(map(str, plans.FOUND))
    assert calls[done:] == ["block:4", *plans.PLANS[4:], *files, *["full"] * len(plans.CONTROLS)]
    assert not (tmp_path / "work").exists()
    with (tmp_path / "plans.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    names = [*plans.PLANS, *(path.stem for path in plans.FOUND), *plans.CONTROLS]
    assert [row["plan"] for row in rows] == names
    assert (rows[0]["time"], rows[0]["psnr"], rows[1]["time"], rows[1]["macs"]) == ("1.0", "", "0.5", "1.0")
    described = json.loads((tmp_path / "plans.json").read_text())
    assert described["settings"]["prompts"] == 8
    assert described["front by same and time"] == ["block:2"]
    assert {"correlation of concept and psnr", "correlation of same and psnr"} <= set(described)
    assert (rows[0]["same"], rows[0]["same_low"]) == ("1.0", "1.0")
    assert described["machine"]["cores"]
    assert Image.open(tmp_path / "grid.png").width > 1000
    assert plotted == [(names, tmp_path / "plans.png")]
    # With --keep, only what is not there is measured, and full, whose pictures the others are compared with.
    other = tmp_path / "mine.json"
    other.write_text(find_plan("skip:2").model_copy(update={"name": "mine"}).model_dump_json())
    del calls[:]
    plans.main([*arguments, "--keep", "--found", str(plans.FOUND[0]), str(other)])
    assert {call for call in calls if " " in call} == {f"{name} {number}" for name in ("full", "mine") for number in (0, 1)}
    missing = [str(plans.plan_and_steps(name, 20)[0]) for name in plans.GRID[1:]]
    assert [call for call in calls if " " not in call] == ["full", str(other), *missing]
    with (tmp_path / "plans.csv").open() as stream:
        merged = {row["plan"]: row for row in csv.DictReader(stream)}
    assert list(merged) == [*plans.PLANS, "found-0.250", "mine", *plans.CONTROLS]
    assert merged["block:3"] == {
        name: str(float(value)) if value and name != "plan" else value for name, value in rows[2].items()
    }
    with pytest.raises(UserError, match="plans.csv has rows of a run with other settings; give those, or leave --keep out"):
        plans.main([*arguments, "--keep", "--rounds", "3"])


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(UserError, match="--count 3 --rounds 7: choose 8 or more"):
        plans.main(["--count", "3"])
