"""Recipes from strangers: each is read and applied, or refused in one line."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from engines.errors import UserError
from tuning.distillation.progressive import next_removal, stages_of
from tuning.errors import TuningError
from tuning.mini.models import new_unet
from tuning.surgery.assembly import assemble
from tuning.surgery.recipes import recipe

VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 3, 10**30, 2**64, float("inf"), float("nan"), "", "up.-1", "*", "**", "[" * 50, "*a" * 90, "\ud800",
    "a\nb", "x" * 100_000, [], ["*"], ["up.-1", "down.-1"], ["mid"], ["mid", "mid"], ["stem"], ["down.0.layer.0"], ["down.-0"],
    ["up.-" + "9" * 4400], ["up.-9999"], ["*.attention"], [1], [1, 1, 1], {}, {"a": 1}, {"count": 4}, {"units": ["*.resnet"]},
    {"units": ["up.0.layer.0.resnet"], "router": "features"}, {"noise": float("inf")}, {"noise": -1}, {"units": ["stem"]},
)  # fmt: skip
KEYS = ("version", "name", "remove", "portions", "experts", "loss", "extra")


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """On the meta device. Assembly leaves it as it is."""
    with torch.device("meta"):
        return new_unet((8, 8, 16, 16), 16)


def described(unet: UNet2DConditionModel) -> tuple[Any, ...]:
    """All that assembly could change of a UNet without weights."""
    shapes = {name: (weight.shape, weight.requires_grad) for name, weight in unet.named_parameters()}
    return dict(unet.config), repr(unet), shapes, unet.training


def apply(unet: UNet2DConditionModel, path: Path) -> None:
    """Read a recipe and make all of its removals."""
    read = recipe(str(path))
    assemble(unet, read)
    student = unet
    for stage in range(stages_of(read)) if read.portions else ():
        student = assemble(student, next_removal(unet, student, read, stage))


@pytest.mark.parametrize("seed", range(3))
def test_mutated_recipes_are_applied_or_refused_in_one_line(unet: UNet2DConditionModel, tmp_path: Path, seed: int) -> None:
    rng, path, before = random.Random(seed), tmp_path / "recipe.json", described(unet)
    refused: list[str] = []
    for _ in range(100):
        content: dict[str, Any] = {
            "version": 1,
            "name": "r",
            "remove": rng.choice([["mid"], ["down.-1", "up.0"], ["*.attention"]]),
        }
        for _ in range(rng.randint(1, 3)):
            content[rng.choice(KEYS)] = rng.choice(VALUES)
        text = json.dumps(content)
        path.write_text(text[: rng.randint(0, len(text))] if rng.random() < 0.1 else text)
        try:
            apply(unet, path)
        except UserError as error:
            refused.append(str(error))
    assert 30 < len(refused) < 100
    assert not [message for message in refused if "\n" in message or len(message) > 2000]
    assert described(unet) == before


@pytest.mark.parametrize("content", ["[" * 100_000, "1" * 5000, '"x"', "", " " * (1 << 21)])
def test_files_that_hold_no_recipe(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(content)
    with pytest.raises(TuningError, match=r"recipe\.json is no recipe"):
        recipe(str(path))


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for name, says in (("pipe", "it is a folder, a pipe or a device"), ("none", "No such file")):
        with pytest.raises(TuningError, match=says):
            recipe(str(tmp_path / f"{name}.json"))
