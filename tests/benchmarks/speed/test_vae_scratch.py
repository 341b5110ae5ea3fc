"""The memory that the VAE works in does not grow with the images of a call, as TensorRT-RTX's compiler says with no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed.vae_scratch import main
from tests.support.sources import save_source

pytest.importorskip("tensorrt_rtx")


def test_scratch_for_one_image_and_for_four(tmp_path: Path) -> None:
    source, out = save_source(tmp_path / "source"), tmp_path / "scratch.json"
    main(["--source", str(source), "--size", "64x64", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    found = {(row["segment"], row["images"], row["at_a_time"]): row["scratch_bytes"] for row in rows}
    for half in ("vae_decoder", "vae_encoder"):
        assert found[half, 1, 1] == found[half, 4, 1] > 0
        assert found[half, 4, 4] > 2 * found[half, 4, 1], "what it was when all images were taken at once"
