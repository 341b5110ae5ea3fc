"""A small checkpoint on disk, and a trace that takes no time, for tests of what a build does around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from engines import Segment
from tests.support import remembered
from tests.support.commands import Command, command
from tests.support.sources import save_source
from tests.support.unets import small_unet


@pytest.fixture(autouse=True)
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of what was built before need not measure it again."""
    monkeypatch.setattr("exporter.graph.graph.infer_shapes_and_macs", remembered.infer_shapes_and_macs)


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a UNet of two stages; not to be changed."""
    return save_source(tmp_path_factory.mktemp("sources") / "tiny")


@pytest.fixture(scope="session")
def layered_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose UNet has the layers that BK-SDM's recipes remove; not to be changed."""
    unet = small_unet("two stages", layers_per_block=2)
    return save_source(tmp_path_factory.mktemp("sources") / "layered", unet)


@pytest.fixture
def exporter(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """``python -m exporter`` in this process."""
    from exporter.__main__ import main

    return command(main, capfd, monkeypatch)


@pytest.fixture
def fake_trace(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Replaces tracing by writing a few bytes; with ``fail_at`` and ``error`` it fails there. Returns the segments traced.

    No weights are read for it, though all that is checked of them is.
    """

    def install(fail_at: str | None = None, error: BaseException | None = None, content: str = "") -> list[str]:
        traced: list[str] = []

        def write(program: Any, segment: Segment, path: Path, opset: int = 0) -> list[Path]:
            path.write_bytes(f"{segment.name}{content}".encode() * 10)
            if segment.name == fail_at:
                assert error is not None
                raise error
            traced.append(segment.name)
            return [path]

        monkeypatch.setattr("exporter.graph.graph.load_graph", remembered.load_graph)
        monkeypatch.setattr("exporter.graph.graph.Graph.segment_module", lambda *given: None)
        monkeypatch.setattr("exporter.segments.writer.trace_program", lambda *given: object())
        monkeypatch.setattr("exporter.segments.writer.write_onnx", write)
        monkeypatch.setattr("engines.ort.engine.OnnxRuntime.compile", lambda *given: [])
        return traced

    return install


def names_in(folder: Path) -> Sequence[str]:
    """What a folder holds, hidden things too."""
    return sorted(path.name for path in folder.iterdir())
