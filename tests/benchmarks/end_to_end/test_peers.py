"""Adapters of peers that run on a GPU only, as far as they can be tried without one; and what a process tells of itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import run_trt
from benchmarks.end_to_end.prepare import written_pipeline
from benchmarks.end_to_end.rows import rows_of
from benchmarks.peers import diffusers_compiled, one_engine, ours
from benchmarks.peers.serve import Call, _DeviceMemory, _versions
from engines import Bundle

CUDA_ONLY = "tensorrt-one-engine,tensorrt-rtx-one-engine,stable-fast"


@pytest.mark.parametrize(
    ("device", "reason"),
    [("cpu", "not available: it runs on cuda only"), ("cuda", "stable-fast/releases")],
)
def test_what_is_not_available_says_why(device: str, reason: str) -> None:
    given = ["--source", "mini", "--dry-run", "--device", device, "--peers", CUDA_ONLY, "--plans", "full"]
    rows = {row.name: row.reason for row in rows_of(run_trt._settings(run_trt._parser().parse_args(given)), {})}
    assert reason in rows["stable-fast"]
    if device == "cpu":
        assert {rows[name] for name in CUDA_ONLY.split(",")} == {reason}


@pytest.mark.slow
@pytest.mark.shared_pieces
def test_one_engine_is_one_segment_with_the_same_output(tmp_path: Path, mini_bundle: Bundle) -> None:
    """On ONNX Runtime, since a CPU has no TensorRT; from the pipeline that all peers read."""
    given = ["--source", "mini", "--device", "cpu", "--peers", "none", "--work", str(tmp_path)]
    folder = written_pipeline(run_trt._settings(run_trt._parser().parse_args(given)), lambda text: None)
    options: dict[str, Any] = {"engine": "onnxruntime", "precision_of_weights": "fp32", "height": 64, "width": 64, "images": 1}
    options |= {"device": "cpu", "threads": 1}
    one_engine.export(folder, tmp_path / "exported", options)
    assert len(Bundle.open(tmp_path / "exported").manifest.unet_segments) == 1
    call = Call("a red star", 3, 3.0, 0, 64, 64)
    made, wanted = (
        load(where, options)(call) for load, where in ((one_engine.load, tmp_path / "exported"), (ours.load, mini_bundle.folder))
    )
    np.testing.assert_allclose(made.latents, wanted.latents, atol=1e-3)


def test_memory_is_what_the_process_itself_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [1000]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free[0] * 2**20, 1000 * 2**20))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    memory = _DeviceMemory(cuda=True)
    memory.start()
    free[0] -= 100  # loaded
    assert memory.stop() == 100
    free[0] -= 500  # another process
    memory.start()
    free[0] -= 20  # a picture
    assert memory.stop() == 120
    assert _DeviceMemory(cuda=False).stop() is None


def test_a_process_tells_its_versions() -> None:
    assert _versions()["torch"] == torch.__version__.partition("+")[0] or _versions()["torch"] == torch.__version__


def test_weights_are_frozen_where_a_cpu_would_lay_them_out_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, given = SimpleNamespace(unet=SimpleNamespace(forward=None)), dict[str, Any]()
    monkeypatch.setattr(diffusers_compiled, "pipeline_of", lambda folder, options: pipeline)
    monkeypatch.setattr(diffusers_compiled, "maker", lambda *made: made)
    monkeypatch.setattr(torch, "compile", lambda forward, **how: given.update(how))
    diffusers_compiled.load(Path("a"), {"device": "cpu"})
    assert given["options"] == {"freezing": True}
    assert given["fullgraph"], "no part runs outside of what is compiled"
