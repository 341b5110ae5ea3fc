"""Forecasts by other measures than steps, and the scale of guidance's difference that fits best."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.quality import forecasts
from engines import Bundle, UserError


def test_places_of_steps() -> None:
    alphas = torch.tensor([0.9, 0.5, 0.1])
    assert forecasts.positions("steps", [2.0, 1.0, 0.0], alphas) == [0, 1, 2]
    assert forecasts.positions("timestep", [2.0, 1.0, 0.0], alphas) == [-2, -1, 0]
    # The logarithms of 1 / 9, 1 and 9.
    assert forecasts.positions("log-SNR", [2.0, 1.0, 0.0], alphas) == pytest.approx([-2.1972, 0, 2.1972], abs=1e-4)


def test_the_scale_is_that_of_least_squares() -> None:
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])
    # Steps 1 and 2 follow step 0, by factors of 0.5 and 2; the last step has both halves itself.
    assert forecasts.best_scale([one, 0.5 * one, 2 * one, 7 * other], [0, 3]) == pytest.approx(1.25)
    # Products are 2 and 8, squares 5 and 4.
    assert forecasts.best_scale([one, other, other, 2 * other], [0, 2]) == pytest.approx(10 / 9)


def test_every_form_is_judged(mini_bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "forecasts.json"
    forecasts.main(["--bundle", str(mini_bundle.folder), "--count", "2", "--steps", "6", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["plan"] for row in rows] == [
        *(name for name in forecasts.FORECASTS for _ in range(3)),
        *["guide:2"] * 2,
        *["guide:3"] * 2,
    ]
    by = {(row["plan"], row["by"]): row["psnr"] for row in rows}
    assert by["forecast:2", "steps"] != by["forecast:2", "log-SNR"]
    assert ("guide:2", "scale 1") in by
    assert all(row["psnr_low"] <= row["psnr"] <= row["psnr_high"] for row in rows)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(UserError, match="--guidance 1 --steps 20: choose above 1, and 4 or more"):
        forecasts.main(["--guidance", "1"])
    with pytest.raises(UserError, match="--count 0 is too few"):
        forecasts.main(["--count", "0"])
