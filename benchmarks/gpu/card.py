"""The card, as its driver describes it, and the engines that can be had on it."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from engines import ON_ONNX, Engine, EngineError, Profile, Segment, Traced, UserError, make_engine
from engines.cuda.gpu import missing_gpu
from engines.ort.engine import OnnxRuntime
from engines.torch_program import Torch

__all__ = ["LAYOUTS", "base_of", "card_state", "check_engines", "device_named", "engine_named", "probe"]

_PROBE = "probe"
"""The name of the small network that tells whether an engine's engines run here."""
_COMPILED = ("tensorrt", "tensorrt-rtx")
"""Engines that say only of what they have built whether it runs here."""

LAYOUTS: dict[str, tuple[str, dict[str, bool]]] = {
    "torch-channels-last": ("torch", {"channels_last": True}),
    "torch-cudnn-benchmark": ("torch", {"cudnn_benchmark": True}),
    "torch-channels-last-cudnn-benchmark": ("torch", {"channels_last": True, "cudnn_benchmark": True}),
    "onnxruntime-nhwc": ("onnxruntime", {"prefer_nhwc": True}),
}
"""Engines with options of theirs that are off until a card has shown what they are worth: the engine, and the options."""

_FIELDS = (
    "name", "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu",
    "power.draw", "power.limit", "utilization.gpu", "memory.used", "memory.total",
)  # fmt: skip


def card_state() -> dict[str, str]:
    """The first card's state, as nvidia-smi reports it: driver, clocks, temperature, power, load; empty where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = done.stdout.splitlines() or [""]
    return dict(zip(_FIELDS, (value.strip() for value in lines[0].split(",")), strict=False))


def device_named(name: str) -> torch.device:
    """The device to check.

    Raises:
        UserError: there is no GPU.
    """
    if name == "cuda" and (missing := missing_gpu()):
        raise UserError(
            f"the check needs an NVIDIA GPU and a PyTorch built for CUDA ({missing}); run it where there is one, or try the "
            "program itself, on the torch engine, with --device cpu --engines torch"
        )
    return torch.device(name)


def base_of(name: str) -> str:
    """The engine whose part of a bundle runs under this name."""
    return LAYOUTS[name][0] if name in LAYOUTS else name


def engine_named(name: str, device: torch.device) -> Engine:
    """An engine on the device, or one of ``LAYOUTS``.

    Raises:
        EngineError: it cannot be had here.
    """
    base, settings = LAYOUTS.get(name, (name, {}))
    if base == "torch":
        return Torch(device, **settings)
    if base == "onnxruntime":
        return OnnxRuntime(device=device, **settings)
    if name in ON_ONNX and device.type == "cpu":
        engine = make_engine(name)
        engine.check_device()
        return engine
    if device.type != "cuda":
        raise EngineError(f"engine {name} runs on an NVIDIA GPU only; leave it out of --engines")
    engine = make_engine(name)
    engine.check_device()
    engine.check_targets(())
    return engine


def check_engines(names: Sequence[str], device: torch.device, targets: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """The engines that can be had, and of the others why not: found before anything is built for them.

    Args:
        names: of engines.
        device: to run on.
        targets: what TensorRT-RTX is to build for; none for what it builds for where none is named.
    """
    found, missing = [], {}
    for name in names:
        try:
            engine = engine_named(name, device)
            if name in _COMPILED:
                probe(engine, targets if engine.targets_allowed else ())
            found.append(name)
        except EngineError as error:
            missing[name] = error.line
    return found, missing


def probe(engine: Any, targets: Sequence[str] = ()) -> None:
    """Build a network of one product, as segments are built, and ask the library whether it runs here: a matter of seconds.

    TensorRT-RTX builds for any card, also for those that it then refuses to run on, such as an H100.

    Args:
        engine: TensorRT or TensorRT-RTX.
        targets: as for a build.

    Raises:
        EngineError: nothing can be built, or what is built cannot be loaded here.
    """
    with TemporaryDirectory() as folder:
        onnx, shapes = _write_probe(Path(folder)), {"x": (16, 16)}
        segment = Segment(name=_PROBE, units=(_PROBE,), inputs=("x",), outputs=("y",))
        try:
            (path,) = engine.compile(Traced(segment, onnx), Path(folder) / _PROBE, Profile(shapes, shapes, shapes), targets)
            reasons = _refused(engine, path.read_bytes())
        except (RuntimeError, TypeError) as error:  # the bindings' own, as where there is no driver
            raise EngineError(f"engine {engine.name} {engine.version()} cannot be used here: {error}") from error
    if reasons:
        raise EngineError(f"engine {engine.name} {engine.version()} cannot run here what it builds here: {', '.join(reasons)}")


def _refused(engine: Any, data: bytes) -> list[str]:
    """Why an engine that was just built cannot be loaded here; nothing where it can."""
    runtime = engine.trt.Runtime(engine._log.logger)
    with engine._log.collect() as errors:
        reasons: list[str] = engine._invalid(runtime, data)
        if not reasons and runtime.deserialize_cuda_engine(data) is None:
            reasons = errors[:1] or ["it gives no reason"]
    return reasons


def _write_probe(folder: Path) -> Path:
    """A product of two matrices in half precision, which every card has that engines are built for."""
    from onnx import TensorProto, helper, save

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, [16, 16]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], _PROBE, [x], [y])
    path = folder / f"{_PROBE}.onnx"
    save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), str(path))
    return path
