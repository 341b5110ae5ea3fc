"""The benchmark of full-size pictures, on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.sizes import full_generate
from engines import UserError
from tests.support.sources import save_source

pytestmark = pytest.mark.shared_pieces


@pytest.mark.slow
@pytest.mark.usefixtures("warm_commands")
def test_pictures_are_made_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, source = tmp_path / "found.json", str(save_source(tmp_path / "tiny"))
    given = ["--source", source, "--sizes", "16x16", "--plan", "block:2", "--steps", "3", "--work", str(tmp_path / "work")]
    full_generate.main([*given, "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert {kind: steps["count"] for kind, steps in row["steps"].items()} == {"key": 2, "inherit": 1}
    assert row["steps"]["inherit"]["seconds"] >= 0
    assert (row["exit"], row["size"]) == (0, "16x16")
    assert row["peak_mb"] > 100
    assert "16x16" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("warm_commands")
def test_a_command_that_fails(tmp_path: Path) -> None:
    given = ["--source", "nowhere", "--sizes", "16x16", "--work", str(tmp_path), "--out", str(tmp_path / "found.json")]
    with pytest.raises(UserError, match="ended with an error"):
        full_generate.main(given)
    assert not (tmp_path / "found.json").exists()
