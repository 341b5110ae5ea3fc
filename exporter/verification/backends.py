"""The two sides of a bisection as Polygraphy's runners, and its comparator between them.

https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/polygraphy/
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines import Engine, EngineError
from engines.errors import UserError
from engines.support.environment import install_command

__all__ = ["BISECTED", "Deviation", "check_polygraphy", "compare", "run_reference", "tensorrt_engine"]

BISECTED = ("onnxruntime", "tensorrt", "tensorrt-rtx")
"""The engines that can be asked for any tensor of a segment."""


@dataclass(frozen=True)
class Deviation:
    """How far a tensor is from the reference, relative to the reference's maximum, and whether that is more than allowed.

    ``error`` is infinite where one side has a number that is not finite and the other has another one there.
    """

    error: float
    departs: bool


def check_polygraphy(engine: Engine) -> None:
    """Get Polygraphy ready for an engine; it has to be told of TensorRT-RTX before it is first imported.

    Raises:
        UserError: it is not installed.
        EngineError: the engine cannot be bisected, or not in this process.
    """
    if engine.name not in BISECTED:
        raise EngineError(
            f"engine {engine.name} cannot be asked for what lies inside a segment; choose one of {', '.join(BISECTED)}"
        )
    rtx = engine.name == "tensorrt-rtx"
    if engine.name != "onnxruntime":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(rtx))
    try:
        from polygraphy import config
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        hint = f"install it with: {install_command('debug')}"
        raise UserError(f"--bisect takes Polygraphy, which cannot be used: {error}; {hint}") from error
    if engine.name != "onnxruntime" and rtx != config.USE_TENSORRT_RTX:
        raise EngineError(f"Polygraphy drives the other TensorRT in this process; bisect engine {engine.name} in a new one")
    G_LOGGER.module_severity = G_LOGGER.CRITICAL


def compare(
    engine: Engine, reference: Path, tested: Path, feed: Mapping[str, np.ndarray], tolerance: float
) -> dict[str, Deviation]:
    """Run one ONNX file with the engine and another in ONNX Runtime, unoptimised, on the CPU; compare their common outputs.

    Args:
        engine: one of ``BISECTED``, after ``check_polygraphy``.
        reference: the file for ONNX Runtime.
        tested: the file for the engine.
        feed: inputs of both, float32 where they are real numbers; they are rounded for a side that takes half precision.
        tolerance: of each output, relative to the reference's maximum.

    Raises:
        EngineError: one side refuses its file.
    """
    from polygraphy.comparator import Comparator, SimpleCompareFunc

    try:
        runs = Comparator.run([_reference(reference), _tested(engine, tested, feed)], data_loader=[dict(feed)])
    except Exception as error:  # of any library
        raise EngineError(f"{tested.name} cannot be run layer by layer: {' '.join(str(error).split())}") from error
    ours, theirs = (results[0] for _, results in runs.items())
    most = {name: _largest(array) for name, array in ours.items()}
    allowed = {name: tolerance * largest for name, largest in most.items()}
    function = SimpleCompareFunc(rtol=0.0, atol=allowed | {"": 0.0}, check_error_stat="max", infinities_compare_equal=True)
    with np.errstate(all="ignore"):  # its statistics of what is not finite
        ((checked,),) = Comparator.compare_accuracy(runs, compare_func=function)[0].values()
    return {name: _deviation(checked[name], most[name]) for name in ours if name in theirs}


def run_reference(path: Path, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A runner of ONNX Runtime for a file, unoptimised, on the CPU."""
    with _reference(path) as runner:
        return {name: np.array(array) for name, array in runner.infer(dict(feed)).items()}


def _reference(path: Path) -> Any:
    import onnxruntime

    return _onnxruntime(path, "cpu", onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, "reference")


def _tested(engine: Engine, path: Path, feed: Mapping[str, np.ndarray]) -> Any:
    import onnxruntime

    if engine.name == "onnxruntime":
        return _onnxruntime(path, engine.device.type, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL, engine.name)
    from polygraphy.backend.trt import TrtRunner

    return TrtRunner(tensorrt_engine(path, feed, rtx=engine.name == "tensorrt-rtx"), name=engine.name)


def _onnxruntime(path: Path, device: str, optimisation: Any, name: str) -> Any:
    import onnxruntime
    from polygraphy.backend.onnxrt import OnnxrtRunner

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = optimisation, 3
    providers = ["CUDAExecutionProvider"] * (device == "cuda") + ["CPUExecutionProvider"]
    return OnnxrtRunner(onnxruntime.InferenceSession(str(path), options, providers=providers), name=name)


def tensorrt_engine(path: Path, feed: Mapping[str, np.ndarray], *, rtx: bool, targets: Sequence[tuple[int, int]] = ()) -> Any:
    """Polygraphy's loader of an engine for the shapes of ``feed``: for the GPU at hand, or for TensorRT-RTX's ``targets``."""
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, EngineFromBytes, NetworkFromOnnxPath, Profile

    shapes = Profile()
    for name, array in feed.items():
        shapes.add(name, min=array.shape, opt=array.shape, max=array.shape)
    network = NetworkFromOnnxPath(str(path), strongly_typed=True)
    if not rtx:
        return EngineFromBytes(EngineBytesFromNetwork(network, CreateConfig(profiles=[shapes])))
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    chosen = {"compute_capabilities": list(targets)} if targets else {"use_gpu": True}
    return EngineFromBytes(EngineBytesFromNetwork(network, CreateConfigRTX(profiles=[shapes], **chosen)))


def _largest(array: np.ndarray) -> float:
    finite = np.abs(array[np.isfinite(array)].astype(np.float64))
    return float(finite.max()) if finite.size else 0.0


def _deviation(result: Any, largest: float) -> Deviation:
    error = float(result.max_absdiff) / (largest or 1.0)
    return Deviation(error if np.isfinite(error) else float("inf"), not result)
