"""The command, as every test of the runtime runs it."""

from __future__ import annotations

import pytest

from tests.support.commands import Command, command


@pytest.fixture
def runtime(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """``python -m runtime`` in this process, in a wide terminal."""
    from runtime.__main__ import main

    monkeypatch.setenv("COLUMNS", "200")
    return command(main, capfd, monkeypatch)
