"""On a machine without a GPU every command says so in one line, before anything asks CUDA for something."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engines import Bundle
from exporter.__main__ import main as exporter
from runtime.__main__ import main as runtime
from tests.support.commands import assert_refused, command

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@no_gpu
@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (runtime, ["a lighthouse at dusk", "--plan", "deepcache:3", "--bundle"]),
        (runtime, ["--explain", "--bundle"]),
        (exporter, ["verify"]),
    ],
)
def test_an_engine_that_needs_one(
    mini_bundle: Bundle, capfd: Any, monkeypatch: pytest.MonkeyPatch, main: Any, arguments: list[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    run = command(main, capfd, monkeypatch)
    outcome = run(*arguments, mini_bundle.folder, "--engine", "tensorrt-rtx")
    assert_refused(
        outcome, "engine tensorrt-rtx needs an NVIDIA GPU and driver to run", "choose --engine torch or --engine onnxr"
    )
