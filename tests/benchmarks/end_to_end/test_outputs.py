"""Every engine's output is held to that of the first one, whatever order and processes rows are measured in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.end_to_end.conftest import Drawn

pytestmark = pytest.mark.shared_pieces

ENGINES = ("--engine", "onnxruntime,openvino")


def rows(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """The rows of the results, by engine."""
    (path,) = (tmp_path / "out").glob("*.json")
    return {row["engine"]: row for row in json.loads(path.read_text())["rows"]}


def test_an_engine_that_draws_something_else_fails_its_row(drawn: Drawn, tmp_path: Path) -> None:
    drawn.spoil["openvino"] = 1.0
    done = drawn.start(*ENGINES)
    assert done.code == 1
    assert re.fullmatch(r"original full, openvino: not the output of the first engine: .* verify allows 0\.018", done.out[-1])
    found = rows(tmp_path)
    assert "fault" not in found["onnxruntime"]
    assert found["openvino"]["deviation"] > 0.1
    assert found["openvino"]["identical"], "with itself"
    assert found["openvino"]["reference_psnr"] < 20
    (page,) = (tmp_path / "out").glob("*.md")
    assert "- original full, openvino: not the output of the first engine" in page.read_text()


def test_engines_may_round(drawn: Drawn, tmp_path: Path) -> None:
    drawn.spoil["openvino"] = 1e-4
    assert drawn.start(*ENGINES).code == 0
    assert 0 < rows(tmp_path)["openvino"]["deviation"] < 1e-3
    assert rows(tmp_path)["onnxruntime"]["deviation"] is None


def test_a_run_that_goes_on_is_held_to_the_same_reference(drawn: Drawn, tmp_path: Path) -> None:
    """The first engine's rows are done; what they drew is on disk."""
    assert drawn.start(*ENGINES).code == 0
    (log,) = (tmp_path / "work").glob("*.jsonl")
    log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if '"engine": "openvino"' not in line))
    drawn.spoil["onnxruntime"] = drawn.spoil["openvino"] = 1.0  # both: nothing but the file tells
    assert drawn.start(*ENGINES, "--resume").code == 1
    assert rows(tmp_path)["openvino"]["deviation"] > 0.1


def test_ratios_are_to_the_first_engine_too(drawn: Drawn, tmp_path: Path) -> None:
    assert drawn.start(*ENGINES).code == 0
    assert {engine: row["overall"] for engine, row in rows(tmp_path).items()} == {"onnxruntime": 1.0, "openvino": 1.0}
    assert drawn.started[:3] == ["onnxruntime", "openvino", "onnxruntime"], "the second engine has the first beside it"
