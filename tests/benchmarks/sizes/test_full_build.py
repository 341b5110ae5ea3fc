"""The benchmarks of builds and of opsets, on small models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.sizes import full_build
from benchmarks.speed import opsets
from engines import UserError
from tests.support.sources import save_source
from tests.support.unets import small_unet
from tuning.checkpoints.find_source import find_source
from tuning.checkpoints.source import FileSource, FolderSource


@pytest.mark.slow
@pytest.mark.usefixtures("warm_commands")
def test_a_build_is_measured_killed_and_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a single file that is written for it, of a UNet with attention in its mid block alone."""
    unet = small_unet("two stages", down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    out, configuration = tmp_path / "found.json", save_source(tmp_path / "tiny", unet)
    source = f"file of {configuration}"
    given = ["--source", source, "--config", str(configuration), "--engine", "onnxruntime"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full_build, "VERIFIED", "16x16")
        full_build.main([*given, "--work", str(tmp_path / "work"), "--out", str(out)])
    (folder,) = (tmp_path / "work").iterdir()
    assert list(folder.iterdir()) == [], "neither weights nor bundles are left"
    rows = {row["what"]: row for row in json.loads(out.read_text())["sources"][source]}
    assert {what: row["exit"] for what, row in rows.items()} == {
        "build": 0, "again, nothing changed": 0, "verify": 0, "killed in the middle": -9, "resumed": 0
    }  # fmt: skip
    assert rows["again, nothing changed"]["seconds"] < rows["build"]["seconds"]
    phases = rows["build"]["phases"]
    assert {"starting", "tracing mid"} <= phases.keys()
    assert rows["build"]["onnx_mb"] >= 0
    assert 100 < max(phases.values()) <= rows["build"]["peak_mb"]
    assert rows["again, nothing changed"]["peak_mb"] < rows["build"]["peak_mb"]
    assert all(30 < row["peak_mb"] < 4000 for row in rows.values())
    assert "killed in the middle" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_weights_are_written_as_users_have_them(tmp_path: Path, kind: str) -> None:
    """What is read from them is what the source had, in half precision; nothing of them is left."""
    source = save_source(tmp_path / "tiny")
    with full_build.written(f"{kind} of {source}", tmp_path / "work") as given:
        found = find_source(given, source if kind == "file" else None)
        assert isinstance(found, FileSource if kind == "file" else FolderSource)
        for part in ("unet", "vae", "text_encoder"):
            wanted = find_source(str(source)).model(part).half().state_dict()
            made = found.model(part).half().state_dict()
            assert made.keys() == wanted.keys()
            assert all(torch.equal(made[name], weight) for name, weight in wanted.items())
    assert list((tmp_path / "work").iterdir()) == []


def test_an_unknown_kind_of_source_is_a_users_mistake(tmp_path: Path) -> None:
    given = ["--source", "pickle of random:sd15", "--work", str(tmp_path), "--out", str(tmp_path / "found.json")]
    with pytest.raises(UserError, match="unknown kind 'pickle'; choose from: file, folder"):
        full_build.main(given)


@pytest.mark.slow
def test_opsets_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "found.json"
    source = save_source(tmp_path / "tiny")
    small = ["--source", str(source), "--block", "down.0.layer.0", "--side", "8", "--rounds", "1", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opsets, "SIZE", (16, 16))
        opsets.main(small)
    rows = json.loads(out.read_text())["rows"]
    layers = {(row["precision"], row["opset"]): row["rtx"].get("layers") for row in rows}
    assert layers["fp16", 18] > layers["fp16", 21] > 0
    assert layers["fp32", 18] > 0
    # Attention as an operator of its own is built where there is a kernel for it: for single precision there is none.
    assert layers["fp32", 23] is None
    assert {str(row["opset"]) for row in rows if "onnxruntime" in row} == {"18", "20", "21", "23", "18, one operator"}
    assert "does not build" in capsys.readouterr().out
