"""What is written of the compiler's kernels names the compiler's version, and is what docs/onnx.md says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed.kernels import BUILT, WAYS, main
from exporter.segments.precision import WIDE
from exporter.segments.trace import OPSET
from tests.support.commands import Command, assert_refused, command
from tests.support.sources import save_source

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def kernels(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """``python -m benchmarks.speed.kernels`` in this process."""
    pytest.importorskip("tensorrt_rtx")
    return command(main, capfd, monkeypatch)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("kernels") / "source")


@pytest.mark.slow
def test_the_file_names_the_compiler_that_made_the_kernels(kernels: Command, source: Path, tmp_path: Path) -> None:
    from engines.tensorrt.engine import TensorRTRTX

    out = tmp_path / "kernels.json"
    done = kernels("--source", source, "--size", "256x256", "--segments", "head", "--target", "sm86", "--out", out)
    assert done.code == 0, done.err
    written = json.loads(out.read_text())
    assert written["versions"]["tensorrt-rtx"] == TensorRTRTX().version()
    assert written["settings"]["target"] == "sm86"
    assert [(row["way"], row["part"], row["norms"]) for row in written["rows"]] == [(way, "UNet", 1) for way in WAYS]
    old, plain = (written["segments"][way][0] for way in ("opset 18, casts round norms", "opset 18"))
    assert old["kernels"] > plain["kernels"], "casts are kernels"


def test_a_segment_that_there_is_not_is_one_line(kernels: Command, source: Path, tmp_path: Path) -> None:
    done = kernels("--source", source, "--size", "64x64", "--segments", "head,tail", "--out", tmp_path / "kernels.json")
    assert_refused(done, "no segment tail", "choose from:", "head")
    assert not list(tmp_path.iterdir())


def test_the_way_that_builds_use_is_among_them() -> None:
    assert WAYS[BUILT] == (OPSET, WIDE, True)


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    """The results in the repository."""
    return json.loads((ROOT / "benchmarks/results/kernels.json").read_text())


def table_rows(committed: dict[str, Any]) -> Iterator[str]:
    """The rows of docs/onnx.md's table."""
    parts = {(row["way"], row["part"]): row for row in committed["rows"]}
    for way in WAYS:
        decoder = parts[way, "vae_decoder"]
        moved, scratch = decoder["bytes_moved"] / 1e9, decoder["scratch_bytes"] / 1e6
        named = f"{way} (what builds do)" if way == BUILT else way
        yield f"| {named} | {_unet(parts[way, 'UNet'])} | {decoder['kernels']}, {moved:.1f}, {scratch:,.0f} |"
    yield f"| the same, the UNet as one engine | {_unet(parts[BUILT, 'UNet, one engine'])} | |"


def _unet(row: dict[str, Any]) -> str:
    fused = (f"{row[f'fused_{name}']} of {row[name]}" for name in ("attentions", "norms"))
    return " | ".join((str(row["kernels"]), *fused, f"{row['bytes_moved'] / 1e9:.2f}"))


def test_the_page_has_what_single_precision_moves(committed: dict[str, Any]) -> None:
    page = (ROOT / "docs/onnx.md").read_text()
    single = json.loads((ROOT / "benchmarks/results/kernels-fp32.json").read_text())
    assert single["settings"] == committed["settings"] | {"precision": "fp32"}
    assert single["versions"]["tensorrt-rtx"] == committed["versions"]["tensorrt-rtx"]
    for precision, results in (("fp32", single), ("fp16", committed)):
        (row,) = (row for row in results["segments"][BUILT] if row["segment"] == "down.0")
        assert f"| {precision} | {_unet(row)} | {row['scratch_bytes'] / 1e6:,.0f} |" in page


def test_the_page_has_the_figures_and_the_version(committed: dict[str, Any]) -> None:
    page = (ROOT / "docs/onnx.md").read_text()
    assert [row for row in table_rows(committed) if row not in page] == []
    version, target = committed["versions"]["tensorrt-rtx"], committed["settings"]["target"]
    assert f"TensorRT-RTX {version.rpartition('.')[0]}, `{target}`" in page
