"""A run of run_trt.py whose subjects draw at once: its course and its results, without engines and processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import run_trt
from benchmarks.end_to_end import run
from engines import Bundle
from tests.support.commands import Outcome, command


@dataclass
class Drawn:
    """Runs the command; ``spoil`` changes an engine's latents, ``before`` is called before each picture with its engine."""

    start: Callable[..., Outcome]
    spoil: dict[str, float] = field(default_factory=dict)
    before: Callable[[str], None] = lambda engine: None
    started: list[str] = field(default_factory=list)

    def subject(self, module: str, folder: Path, options: dict[str, Any], *others: object) -> Any:
        """In place of a process."""
        return _Subject(self, options["engine"] or module)


class _Subject:
    def __init__(self, run: Drawn, engine: str) -> None:
        self._run, self._engine, self.about = run, engine, {"load_seconds": 1.0}
        run.started.append(engine)

    def picture(self, call: Any) -> dict[str, Any]:
        self._run.before(self._engine)
        latents = np.random.default_rng(call.seed).normal(size=(1, 4, 8, 8)).astype(np.float32)
        latents += self._run.spoil.get(self._engine, 0.0)
        pictures = np.clip(128 + 40 * latents[..., :3].transpose(0, 2, 1, 3), 0, 255).astype(np.uint8)
        found = {"latents": latents, "pictures": pictures, "seconds": 1.0, "cpu": 1.0, "peak_mb": 1.0, "device_mb": None}
        return found | {"text": 0.1, "vae": 0.2, "unet": [("key", 0.3)] * call.steps, "segments": [("a", 0.1, 0.2)]}

    def __enter__(self) -> _Subject:
        return self

    def __exit__(self, *given: object) -> None:
        """Nothing ends."""


@pytest.fixture
def drawn(mini_bundle: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """Of the model mini, on whatever engines are named, for one round of two steps."""
    runs = command(run_trt.main, capfd, monkeypatch)
    given = ["--source", "mini", "--device", "cpu", "--variants", "original", "--plans", "full", "--peers", "none",
             "--rounds", "1", "--steps", "2", "--out", tmp_path / "out", "--work", tmp_path / "work"]  # fmt: skip
    made = Drawn(lambda *more: runs(*given, *more))
    monkeypatch.setattr(run, "build", lambda *given: mini_bundle)
    monkeypatch.setattr(run, "check_engines", lambda names, device: (list(names), {}))
    monkeypatch.setattr(run, "Subject", made.subject)
    monkeypatch.setattr(run, "written_pipeline", lambda *given: tmp_path / "pipeline")
    return made
