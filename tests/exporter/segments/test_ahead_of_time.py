"""A whole checkpoint becomes TensorRT-RTX engines by the real library, on a machine with no GPU: what a build in CI does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engines import Bundle, EngineError
from engines.tensorrt.engine import TensorRTRTX
from engines.tensorrt.error_log import ErrorLog
from exporter import BuildOptions, build
from exporter.segments.progress import Step

trt = pytest.importorskip("tensorrt_rtx")

TARGETS = ("sm86", "sm89", "sm120")


@pytest.fixture(scope="module")
def built(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The small checkpoint in half precision, for three kinds of cards and three chunks of text, in few segments."""
    options = BuildOptions(
        source=str(tiny_source),
        engines=("tensorrt-rtx",),
        precision="fp16",
        targets=TARGETS,
        text_chunks=3,
        granularity=None,
        plans=("deepcache:2",),
        out=tmp_path_factory.mktemp("rtx") / "bundle",
    )
    bundle, new = build(options)
    assert new
    steps: list[Step] = []
    assert not build(options, steps.append)[1], "nothing is built again"
    assert [step.phase for step in steps] == ["reading the source"]
    return bundle


@pytest.mark.slow
def test_every_segment_has_an_engine_for_every_target(built: Bundle) -> None:
    built.check()
    units = {unit for segment in built.manifest.segments for unit in segment.units}
    assert units == {unit.name for unit in built.manifest.units}
    for segment in built.manifest.segments:
        compiled = segment.engines["tensorrt-rtx"]
        assert compiled.targets == TARGETS
        assert compiled.version == trt.__version__
        assert [file.path for file in compiled.files] == [f"engines/tensorrt-rtx/{segment.name}.engine"]


def test_every_engine_is_one_that_the_library_reads(built: Bundle) -> None:
    """As far as it looks without a GPU: whatever else is wrong on this machine, the files are not."""
    runtime, wrong = trt.Runtime(ErrorLog(trt).logger), trt.EngineInvalidityDiagnostics
    for segment in built.manifest.segments:
        (file,) = segment.engines["tensorrt-rtx"].files
        data = built.path(file).read_bytes()
        found = int(runtime.get_engine_validity(data)[1])
        assert not found & (int(wrong.MALFORMED_ENGINE) | int(wrong.VERSION_MISMATCH))
        assert int(runtime.get_engine_validity(b"?" + data[1:])[1]) & int(wrong.MALFORMED_ENGINE), "it does look"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_is_not_loaded(built: Bundle) -> None:
    with pytest.raises(EngineError, match="engine tensorrt-rtx needs an NVIDIA GPU and driver to run"):
        TensorRTRTX().load(built, built.manifest.segment("text_encoder"))
