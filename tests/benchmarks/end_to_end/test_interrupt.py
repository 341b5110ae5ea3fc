"""Ctrl-C keeps the rows that are done, and the command says by its exit code that it was interrupted."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.benchmarks.end_to_end.conftest import Drawn

pytestmark = pytest.mark.shared_pieces


def test_the_rows_that_are_done_are_reported(drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started without it

    def interrupt(engine: str) -> None:
        if engine == "openvino":
            signal.raise_signal(signal.SIGINT)

    drawn.before = interrupt
    given = ("--engine", "onnxruntime,openvino")
    done = drawn.start(*given)
    assert done.code == 130
    (line,) = done.err
    assert "interrupted" in line
    assert "--resume" in line
    (path,) = (tmp_path / "out").glob("*.json")
    first, second = json.loads(path.read_text())["rows"]
    assert first["pictures"] == 1
    assert second["reason"] == "not measured"

    drawn.before = lambda engine: None
    assert drawn.start(*given, "--resume").code == 0
    assert all(row["pictures"] >= 1 for row in json.loads(path.read_text())["rows"])
