"""Run a command in this process as the shell would, and see what it left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engines.support.cli import run_command


@dataclass(frozen=True)
class Outcome:
    """Exit code and the lines of both outputs."""

    code: int
    out: list[str]
    err: list[str]


Command = Callable[..., Outcome]


def command(main: Callable[[Sequence[str]], None], capfd: Any, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command as a function of its arguments. Output is captured from the file descriptors, where libraries write too."""

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            run_command(main)
        out, err = capfd.readouterr()
        code = leaving.value.code
        assert isinstance(code, int)
        return Outcome(code, out.splitlines(), err.splitlines())

    return run


def assert_refused(outcome: Outcome, *parts: str) -> None:
    """One line of ours, exit code 2, and every part in the line."""
    assert outcome.code == 2
    assert len(outcome.err) == 1, outcome.err
    assert outcome.err[0].startswith("error: ")
    for part in parts:
        assert part in outcome.err[0]


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file under a folder, with its size and time of change: what must stay as it is."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() or path.is_symlink()
    }
