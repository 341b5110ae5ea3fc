"""The command, as every test of the runtime runs it, and two bundles that take turns."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import Command, command
from tests.support.unets import manifest_of, small_unet, written_manifest


@pytest.fixture
def runtime(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """``python -m runtime`` in this process, in a wide terminal."""
    from runtime.__main__ import main

    monkeypatch.setenv("COLUMNS", "200")
    return command(main, capfd, monkeypatch)


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A bundle of a small UNet, which has no files but its manifest."""
    return written_manifest(manifest_of(small_unet("uneven")), tmp_path / "bundles" / "original")


@pytest.fixture
def assembled(tmp_path: Path) -> Path:
    """The same of another UNet, beside it."""
    return written_manifest(manifest_of(small_unet("no mid")), tmp_path / "bundles" / "assembled", variant="assembled")
