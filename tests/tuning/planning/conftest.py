"""The command, as every test of the search runs it."""

from __future__ import annotations

import pytest

from tests.support.commands import Command, command


@pytest.fixture
def tuning(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """``python -m tuning`` in this process, in a wide terminal."""
    from tuning.__main__ import main

    monkeypatch.setenv("COLUMNS", "200")
    return command(main, capfd, monkeypatch)
