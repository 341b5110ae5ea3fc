"""The table of plans under the usual schedulers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality import schedulers
from engines import Bundle, UserError
from runtime.plans.presets import find_plan
from runtime.plans.words import Found


def test_plans_and_fewer_steps_are_judged_by_each_scheduler(mini_bundle: Bundle, tmp_path: Path) -> None:
    out, found = tmp_path / "schedulers.json", tmp_path / "found.json"
    words = Found(scheduler="dpm++", steps=6, guidance_scale=3, prompts=4, cost=0.5, psnr=40)
    found.write_text(find_plan("skip:2").model_copy(update={"name": "mine", "found": words}).model_dump_json())
    given = ["--bundle", str(mini_bundle.folder), "--found", str(found), "--schedulers", "ddim", "heun"]
    schedulers.main([*given, "--count", "2", "--steps", "6", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    names = [*schedulers.PLANS, "mine", "3 steps", "2 steps"]
    assert [(row["scheduler"], row["plan"]) for row in rows] == [(each, name) for each in ("ddim", "heun") for name in names]
    cost = {(row["scheduler"], row["plan"]): row["cost"] for row in rows}
    assert (cost["ddim", "3 steps"], cost["heun", "3 steps"]) == (0.5, round(5 / 11, 3))
    assert all(0 < row["cost"] < 1 for row in rows)
    assert all(row["psnr_low"] <= row["psnr"] <= row["psnr_high"] for row in rows)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(UserError, match="--steps 3: choose 4 or more"):
        schedulers.main(["--steps", "3"])
