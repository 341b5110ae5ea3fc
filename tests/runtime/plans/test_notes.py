"""What a found plan says of itself, and when a call is not what it was found for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import Bundle
from runtime import Pipeline, find_plan
from runtime.plans.notes import described_find, found_for_others
from runtime.plans.words import Found
from tests.support.commands import Command

FOUND = find_plan("skip:2").model_copy(
    update={"name": "found", "found": Found(scheduler="ddim", steps=4, guidance_scale=3.0, prompts=16, cost=0.75, psnr=61.5)}
)


def test_a_plan_says_what_it_was_found_for() -> None:
    assert described_find(find_plan("skip:2")) == ""
    line = described_find(FOUND)
    assert line == "found for 4 steps of ddim with guidance 3: MACs 0.75 of full, 61.5 dB to its pictures on 16 prompts"
    assert found_for_others(FOUND, "ddim", 4) == found_for_others(find_plan("full"), "dpm++", 20) == ""
    assert "found for 4 steps of ddim, and this is 20 of dpm++" in found_for_others(FOUND, "dpm++", 20)
    assert FOUND.found is not None
    on_emoji = FOUND.model_copy(update={"found": FOUND.found.model_copy(update={"source": "emoji"})})
    assert described_find(on_emoji).startswith("found on emoji for 4 steps of ddim")
    assert found_for_others(on_emoji, "ddim", 4, "emoji") == ""
    assert "was found on emoji, and this is mini: its pictures may be" in found_for_others(on_emoji, "ddim", 4, "mini")


@pytest.fixture(autouse=True)
def not_warned_yet(mini_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests' calls of the shared pipeline may have been warned of already."""
    monkeypatch.setattr(mini_pipeline, "_warned", set())


def test_a_call_of_another_kind_is_warned_of_once(mini_pipeline: Pipeline) -> None:
    with pytest.warns(UserWarning, match="plan found was found for 4 steps of ddim, and this is 3 of ddim"):
        mini_pipeline.generate("a red star", plan=FOUND, steps=3, scheduler="ddim")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mini_pipeline.generate("a red star", plan=FOUND, steps=3, scheduler="ddim")
        mini_pipeline.generate("a red star", plan=FOUND, steps=4, scheduler="ddim")


def test_halves_without_guidance_are_noted_once(mini_pipeline: Pipeline, runtime: Command, mini_bundle: Bundle) -> None:
    """They do nothing there, and are no error."""
    options: dict[str, Any] = {"steps": 2, "scheduler": "ddim", "output_type": "latent"}
    with pytest.warns(UserWarning, match="plan guide:2 says at which steps guidance evaluates both of its halves, and without"):
        made = mini_pipeline.generate("a red star", plan="guide:2", guidance_scale=1, **options)
    assert torch.equal(made.latents, mini_pipeline.generate("a red star", guidance_scale=1, **options).latents)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mini_pipeline.generate("a red star", plan="guide:2", guidance_scale=1, **options)
        mini_pipeline.generate("a red star", plan="guide:2", guidance_scale=3, **options)
    given = ("a red star", "--bundle", mini_bundle.folder, "--plan", "guide:2", "--explain", "--steps", 2)
    assert "that part of the plan does nothing" in runtime(*given, "--guidance", 1).out[-1]
    assert "does nothing" not in runtime(*given, "--guidance", 3).out[-1]


def test_explain_prints_it(runtime: Command, mini_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    path.write_text(FOUND.model_dump_json())
    outcome = runtime(
        "a red star", "--bundle", mini_bundle.folder, "--plan", path, "--explain", "--steps", 4, "--scheduler", "ddim"
    )
    assert outcome.out[-1].startswith("found for 4 steps of ddim with guidance 3: MACs 0.75 of full")
