"""Engines that cannot be had are found by what their libraries say of a small network, before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from benchmarks.gpu.card import _write_probe, check_engines
from engines import EngineError
from engines.tensorrt.engine import TensorRT, TensorRTRTX
from tests.support.fake_tensorrt import EngineInvalidityDiagnostics, FakeTensorRT, Program

GPU = torch.device("cuda")


class Here:
    """A machine with a card, for which both libraries build a network whose engine is for ``built``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trt = FakeTensorRT({b"probe": Program(torch.relu, {"x": ((16, 16), (16, 16))}, ("y",))})
        self.targets: list[tuple[str, ...]] = []
        monkeypatch.setattr("benchmarks.gpu.card.make_engine", self.make)

    def make(self, name: str) -> Any:
        if name == "openvino":
            raise EngineError("engine openvino cannot be used: no module named openvino")
        engine = {"tensorrt": TensorRT, "tensorrt-rtx": TensorRTRTX}[name](self.trt, torch.device("cpu"))
        check = engine.check_targets

        def noting(targets: Any) -> tuple[str, ...]:
            self.targets.append(tuple(targets))
            return check(targets)

        engine.check_targets = noting  # type: ignore[method-assign]
        return engine


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    return Here(monkeypatch)


def test_what_the_card_runs_can_be_had(here: Here) -> None:
    found, missing = check_engines(["tensorrt-rtx", "tensorrt"], GPU)
    assert found == ["tensorrt-rtx", "tensorrt"]
    assert missing == {}
    assert len(here.trt.engines) == 2, "what was built is loaded"


def test_a_card_that_the_library_builds_for_and_does_not_run_on(here: Here) -> None:
    here.trt.card = "sm90"
    found, missing = check_engines(["tensorrt-rtx"], GPU)
    assert found == []
    assert missing == {"tensorrt-rtx": "engine tensorrt-rtx 11.0.0 cannot run here what it builds here: unsupported cc"}
    assert here.trt.engines == []


def test_the_library_says_that_the_driver_is_old(here: Here) -> None:
    here.trt.trouble = int(EngineInvalidityDiagnostics.OLD_CUDA_DRIVER)
    assert check_engines(["tensorrt-rtx"], GPU)[1]["tensorrt-rtx"].endswith("what it builds here: old cuda driver")


def test_a_library_without_diagnostics_tells_by_its_log(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorRT, "_invalid", lambda engine, runtime, data: [])
    here.trt.card = "sm90"
    assert "what it builds here: deserializeCudaEngine: incompatible device" in check_engines(["tensorrt"], GPU)[1]["tensorrt"]


def test_an_engine_that_builds_nothing_is_left_out(here: Here) -> None:
    here.trt.builds = False
    assert "segment probe: tensorrt-rtx 11.0.0 cannot build it" in check_engines(["tensorrt-rtx"], GPU)[1]["tensorrt-rtx"]


def test_bindings_that_break_off_leave_the_engine_out(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(logger: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(here.trt, "Builder", breaks)
    assert "cannot be used here: pybind11::init()" in check_engines(["tensorrt"], GPU)[1]["tensorrt"]


def test_targets_that_were_named_are_those_that_are_tried(here: Here) -> None:
    check_engines(["tensorrt-rtx", "tensorrt"], GPU, ["sm89"])
    assert ("sm89",) in here.targets
    assert () in here.targets, "TensorRT takes none"
    assert "unknown target 'sm99'" in check_engines(["tensorrt-rtx"], GPU, ["sm99"])[1]["tensorrt-rtx"]


def test_an_engine_that_is_not_installed(here: Here) -> None:
    found, missing = check_engines(["openvino"], GPU)
    assert found == []
    assert "no module named openvino" in missing["openvino"]


def test_the_network_is_a_network(tmp_path: Path) -> None:
    model = onnx.load(_write_probe(tmp_path))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["MatMul"]


def test_the_real_library_builds_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from engines import Profile, Segment, Traced

    shapes = {"x": (16, 16)}
    segment = Segment(name="probe", units=("probe",), inputs=("x",), outputs=("y",))
    profile = Profile(shapes, shapes, shapes)
    (path,) = TensorRTRTX().compile(Traced(segment, _write_probe(tmp_path)), tmp_path / "probe", profile, ("sm89",))
    assert path.stat().st_size > 1000
