"""The committed logs of distillation, and what the pages say of them."""

import json
from pathlib import Path
from typing import Any

import pytest

TRAINING = Path("models/mini/training")
PAGE = " ".join(Path("docs/tuning.md").read_text().split())


def validations(log: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (TRAINING / log).read_text().splitlines()]
    return [line for line in lines if "valid_loss" in line]


def test_minutes_of_distillation_lower_the_loss_of_the_pruned_unet() -> None:
    before, after = validations("comparison/at-once.jsonl")
    assert (before["step"], after["step"]) == (0, 300)
    assert after["wall_minutes"] < 10
    assert after["valid_loss"] < 0.1 * before["valid_loss"]
    assert f"took {after['wall_minutes']:.1f} minutes" in PAGE
    assert f"leaves from {before['valid_loss']:.3g} to {after['valid_loss']:.3g}" in PAGE
    assert f"(`valid_output`) from {before['valid_output']:.3g} to {after['valid_output']:.3g}" in PAGE


def test_the_page_compares_portions_with_removal_at_once() -> None:
    at_once, portions = validations("comparison/at-once.jsonl")[-1], validations("comparison/progressive.jsonl")
    assert [(line["stage"][8], line["step"]) for line in portions] == [(n, step) for n in "123" for step in (0, 100)]
    last = portions[-1]
    assert at_once["valid_output"] < last["valid_output"], "it did not pay"
    for words in (
        f"leave the student of `assembled` {at_once['valid_output']:.3g} from its teacher",
        f"that of `progressive` {last['valid_output']:.3g}",
        f"and {at_once['valid_noise']:.3g} and {last['valid_noise']:.4f} from the velocity",
        f"the losses are {at_once['valid_loss']:.3g} and {last['valid_loss']:.3g}",
        f"(to {portions[2]['valid_loss']:.3g} and {portions[4]['valid_loss']:.3g} after the first)",
    ):
        assert words in PAGE


def test_the_page_compares_both_routers() -> None:
    page = " ".join(Path("docs/condconv.md").read_text().split())
    features, timestep, plain = (validations(f"{name}/metrics.jsonl") for name in ("condconv-features", "condconv", "assembled"))
    assert {found[-1]["step"] for found in (features, timestep, plain)} == {1000}
    assert features[0]["step"] == 0, "it was measured before its first step"
    for figure, words in (
        ("valid_loss", "a validation loss of {:.3g} against {:.3g}, where that of `assembled` is {:.3g}"),
        ("valid_output", "{:.3g} against {:.3g} from the teacher (`valid_output`), where `assembled` is {:.3g}"),
    ):
        assert words.format(*(found[-1][figure] for found in (features, timestep, plain))) in page


@pytest.mark.parametrize("log", sorted(TRAINING.rglob("*.jsonl")), ids=lambda log: log.relative_to(TRAINING).as_posix())
def test_logs_are_whole(log: Path) -> None:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[-1]["progress"] >= 1
    stages = [line["stage"] for line in lines]
    for stage in dict.fromkeys(stages):
        steps = [line["step"] for line in lines if line["stage"] == stage]
        assert steps == sorted(steps)
