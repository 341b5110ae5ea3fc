"""On a machine without a GPU every command says so in one line, before anything asks CUDA for something."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import Bundle, Engine, EngineError
from engines.ort.engine import OnnxRuntime
from engines.tensorrt.engine import TensorRT, TensorRTRTX
from engines.torch_program import Torch
from exporter.__main__ import main as exporter
from exporter.verification.verify import verify
from runtime import Pipeline
from runtime.__main__ import main as runtime
from serving.__main__ import main as serve
from tests.support.commands import assert_refused, command
from tests.support.fake_tensorrt import FakeTensorRT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture(params=[TensorRT, TensorRTRTX])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an engine that runs on nothing else, and whose package is there."""
    monkeypatch.setitem(sys.modules, request.param.module, FakeTensorRT({}))
    return str(request.param.name)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of one."""
    path = tmp_path / "prompts.txt"
    path.write_text("a lighthouse at dusk\n")
    return path


@pytest.fixture
def quiet_log() -> Iterator[None]:
    """What a server does to the process's log is undone."""
    yield
    logging.captureWarnings(False)


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (runtime, "a-lighthouse --plan deepcache:3 --bundle BUNDLE"),
        (runtime, "--explain --bundle BUNDLE"),
        (runtime, "--prompts PROMPTS --out OUT --bundle BUNDLE"),
        (serve, "--port 0 --quiet --bundle BUNDLE"),
        (exporter, "verify BUNDLE"),
        (exporter, "verify BUNDLE --bisect mid"),
    ],
    ids=["a picture", "--explain", "--prompts", "serve", "verify", "--bisect"],
)
@pytest.mark.usefixtures("quiet_log")
def test_a_command_with_an_engine_that_needs_one(
    mini_bundle: Bundle, prompts: Path, engine: str, capfd: Any, monkeypatch: pytest.MonkeyPatch, main: Any, arguments: str
) -> None:
    """Its own message comes first: of no other package that a command takes, and not after what takes long."""
    monkeypatch.delenv("UNET_HEIRLOOM_API_KEY", raising=False)
    monkeypatch.setattr("exporter.verification.verify.Reference.load", lambda bundle: pytest.fail("a model was loaded first"))
    out = prompts.parent / "out"
    places = {"BUNDLE": mini_bundle.folder, "PROMPTS": prompts, "OUT": out}
    run = command(main, capfd, monkeypatch)
    outcome = run(*(places.get(word, word) for word in arguments.split()), "--engine", engine)
    said = f"engine {engine} needs an NVIDIA GPU and driver to run"
    assert_refused(outcome, said, "choose --engine torch or --engine onnxruntime")
    assert not out.exists()


@pytest.mark.parametrize(
    "make",
    [lambda: Torch("cuda"), lambda: OnnxRuntime(device="cuda"), lambda: TensorRT(FakeTensorRT({}))],
    ids=["torch", "onnxruntime", "tensorrt"],
)
@pytest.mark.parametrize("use", [Pipeline, lambda bundle, engine: list(verify(bundle, engine))], ids=["pipeline", "verify"])
def test_an_engine_that_is_told_to_run_on_one(
    mini_bundle: Bundle, make: Callable[[], Engine], use: Callable[[Bundle, Engine], object]
) -> None:
    with pytest.raises(EngineError, match=r"^engine \w+ (cannot run on cuda here: that )?needs .*GPU.*; install them, or"):
        use(mini_bundle, make())
