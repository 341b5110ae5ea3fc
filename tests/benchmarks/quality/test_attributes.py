"""The accuracy command: perfect pictures score 1, wrong ones don't, and what it writes says where it ran."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import runtime
from benchmarks.quality import attributes
from engines.errors import UserError
from tuning.mini.reader_network import WEIGHTS
from tuning.mini.render import render
from tuning.mini.scenes import caption, held_back_prompts, sample_scene

pytestmark = pytest.mark.shared_pieces


def painter(calls: list[dict[str, Any]], shift: int = 0) -> Any:
    """A stand-in for runtime.generate that renders what the prompt says, or what the next prompt says."""
    drawn: dict[str, Any] = {}
    rng = random.Random("held-back 0")  # the same draws as held_back_prompts
    while len(drawn) < 40:
        scene = sample_scene(rng, held=True)
        drawn[caption(scene, rng)] = scene

    def generate(prompts: list[str], **options: Any) -> SimpleNamespace:
        calls.append(options)
        scenes = [drawn[p] for p in prompts]
        scenes = scenes[shift:] + scenes[:shift]
        return SimpleNamespace(images=[Image.fromarray(p) for p in render(scenes, np.random.default_rng(0))])

    return generate


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the network reader is not trained yet")
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mini-original").mkdir()
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(runtime, "generate", painter(calls))
    out = tmp_path / "figures.json"
    arguments = ["--count", "40", "--bundles", str(tmp_path), "--out", str(out), "--grids", str(tmp_path / "grids")]
    attributes.main(arguments)
    figures = json.loads(out.read_text())
    assert set(figures["rows"]) == {"original, full", "original, block:3"}
    for row in figures["rows"].values():
        assert row["rules"]["all"] == 1
        assert row["network"]["all"] >= 0.97
    assert figures["settings"]["prompts"] == 40
    assert figures["versions"]["torch"]
    assert [call["plan"] for call in calls] == ["full", "block:3"]
    assert "exporter build --variant assembled" in capsys.readouterr().err
    assert Image.open(tmp_path / "grids" / "original-block-3.png").size == (16 * 64, 2 * 64)


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the network reader is not trained yet")
def test_wrong_pictures_score_low(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "generate", painter([], shift=1))
    prompts = held_back_prompts(40)
    shares, pictures, _ = attributes.measure(tmp_path, "full", prompts, steps=20, guidance=3, engine="onnxruntime")
    assert len(pictures) == 40
    assert shares["rules"]["all"] < 0.1
    assert shares["network"]["all"] < 0.1
    assert shares["rules"]["shape"] < 0.4


def test_without_bundles_it_says_what_to_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no bundle in"):
        attributes.main(["--bundles", str(tmp_path), "--out", str(tmp_path / "figures.json")])
    assert "python -m exporter build --variant original" in capsys.readouterr().err
