"""Results are written whole or not at all, and a place where none can be written is told before anything is measured."""

from __future__ import annotations

import errno
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine import results_file, write_results
from tests.support.commands import assert_refused, command, contents

COMMANDS = {
    "quality.emoji": [],
    "quality.forecasts": [],
    "quality.plans": [],
    "quality.schedulers": [],
    "sizes.assemble": [],
    "condconv.costs": [],
    "speed.start": ["--bundle", "none"],
}


def test_a_full_disk_keeps_the_results_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_results(path, {"seconds": 1})
    before = path.read_bytes()
    assert json.loads(before)["seconds"] == 1
    write = Path.write_bytes

    def fill(target: Path, data: Any) -> int:
        write(target, bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(OSError, match="No space left"):
        write_results(path, {"seconds": 2})
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_place_for_results_is_tried_before_anything_is_measured(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    before = contents(tmp_path)
    run = command(import_module(f"benchmarks.{name}").main, capfd, monkeypatch)
    for out, says in (("file/results.json", "file"), ("folder", "folder cannot be read or written (Is a directory)")):
        assert_refused(run(*COMMANDS[name], "--out", out), says, "choose another path")
    assert contents(tmp_path) == before


def test_a_place_is_tried_without_a_trace(tmp_path: Path) -> None:
    assert results_file(str(tmp_path / "new" / "results.json")) == tmp_path / "new" / "results.json"
    assert not list(tmp_path.iterdir())
