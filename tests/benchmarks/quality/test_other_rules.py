"""The rules of others: which steps they skip, what they predict there, and the command's figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.quality import other_rules
from benchmarks.quality.other_rules import Curvature, Rule, Sada
from engines import Bundle, UserError
from runtime.images.prediction_spaces import PredictionSpaces

ALPHAS = torch.linspace(0.99, 0.01, 1000)
SPACES = PredictionSpaces(ALPHAS, "v_prediction")
TIMESTEPS = list(range(950, -1, -50))


def latents(value: float) -> Tensor:
    return torch.full((1, 1, 2, 2), value)


def skipped(rule: Rule, values: list[float], prediction: Tensor) -> list[int]:
    """The steps that a rule skips on latents of these values; every step that it does not predicts the same."""
    found = []
    for index, value in enumerate(values):
        x = latents(value)
        if rule.skips(index, x):
            found.append(index)
            rule.saw(index, x, rule.prediction(index, x))
        else:
            rule.saw(index, x, prediction)
    return found


def test_where_latents_change_evenly_most_steps_are_skipped() -> None:
    """From the fifth on, and no more than so many in a row."""
    rule = Curvature(0.01, TIMESTEPS, SPACES, most=4)
    assert skipped(rule, [1.5 * step for step in range(14)], torch.ones(2, 1, 2, 2)) == [4, 5, 6, 7, 8, 10, 11, 12, 13]


def test_where_the_change_itself_changes_none_is_skipped() -> None:
    values = [0.0, 1.0, 3.0, 4.0, 6.0, 7.0, 9.0, 10.0, 12.0]  # by 1 and by 2, in turns
    assert skipped(Curvature(0.49, TIMESTEPS, SPACES), values, torch.ones(2, 1, 2, 2)) == []
    assert skipped(Curvature(1.01, TIMESTEPS, SPACES), values, torch.ones(2, 1, 2, 2)) == [4, 5, 6, 7, 8]


def test_what_is_carried_is_noise() -> None:
    rule, x, later = Curvature(0.01, TIMESTEPS, SPACES), latents(0.3), latents(0.5)
    prediction = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    rule.saw(3, x, prediction)
    before, after = (
        SPACES.to("eps", prediction, x, TIMESTEPS[3]),
        SPACES.to("eps", rule.prediction(7, later), later, TIMESTEPS[7]),
    )
    assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_sign_of_the_extrapolations_error_decides(sign: float) -> None:
    """Slopes of 1, 2 and 4: their second difference is above zero, so that latents below the extrapolation are skipped from."""
    rule = Sada(TIMESTEPS, ALPHAS, torch.full((1000,), 0.01), guidance=3.0)
    for index, slope in ((4, 1.0), (5, 2.0), (6, 4.0)):
        alpha, sigma = float(ALPHAS[TIMESTEPS[index]]) ** 0.5, (1 - float(ALPHAS[TIMESTEPS[index]])) ** 0.5
        velocity = slope * sigma / (0.5 * 0.01 * len(TIMESTEPS) * alpha)
        rule.saw(index, latents(1.0), torch.full((2, 1, 2, 2), velocity))
    extrapolated = 1.0 - (0.625 * 4 + 0.75 * 2 - 0.375 * 1) / len(TIMESTEPS)
    x = latents(extrapolated - sign * 0.1)
    assert rule.skips(7, x) is (sign > 0)
    if sign > 0:
        made = rule.prediction(7, x)
        picture = SPACES.to("x0", made, x, TIMESTEPS[7])
        expected = SPACES.to("x0", torch.full((1, 1, 2, 2), velocity), latents(extrapolated), TIMESTEPS[7])
        assert made.shape == (2, 1, 2, 2)
        assert torch.allclose(picture[:1], expected, atol=1e-4)


def test_its_range_and_its_longest_run() -> None:
    """Of 20 steps 5 to 18 may be skipped, and after so many in a row one is evaluated."""
    rule = Sada(TIMESTEPS, ALPHAS, torch.full((1000,), 0.01), guidance=3.0, most=4)
    found = skipped(rule, [0.0] * 20, torch.zeros(2, 1, 2, 2))
    assert found == [5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18]


def test_the_command(mini_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_rules, "PRESETS", ("deepcache:2",))
    monkeypatch.setattr(other_rules, "CURVATURES", (0.0, 10.0))
    monkeypatch.setattr(other_rules, "FEWER_STEPS", (4,))
    out = tmp_path / "rules.json"
    other_rules.main(["--bundle", str(mini_bundle.folder), "--count", "2", "--steps", "8", "--out", str(out)])
    found = json.loads(out.read_text())["rules"]
    assert list(found) == ["deepcache:2", "AdaptiveDiffusion 0", "AdaptiveDiffusion 10", "SADA", "4 steps"]
    assert found["4 steps"]["macs"] == 0.5
    assert (found["AdaptiveDiffusion 0"]["macs"], found["AdaptiveDiffusion 0"]["psnr"]) == (1.0, 100.0)
    assert found["AdaptiveDiffusion 10"]["macs"] == 0.5  # four steps of eight: all of the fifth to the eighth
    assert all(row["psnr_low"] <= row["psnr"] <= row["psnr_high"] for row in found.values())


@pytest.mark.parametrize("options", [["--count", "1"], ["--guidance", "1"], ["--steps", "7"]])
def test_options_that_are_refused(options: list[str]) -> None:
    with pytest.raises(UserError, match="choose 2 or more, above 1, and 8 or more"):
        other_rules.main(options)
