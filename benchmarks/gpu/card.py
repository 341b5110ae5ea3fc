"""The card, as its driver describes it, and the engines that can be had on it."""

import subprocess
from collections.abc import Sequence

import torch

from engines import ON_ONNX, Engine, EngineError, UserError, make_engine
from engines.ort.engine import OnnxRuntime
from engines.torch_program import Torch

__all__ = ["card_state", "check_engines", "device_named", "engine_named"]

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
    if name == "cuda" and not torch.cuda.is_available():
        found = "it finds none" if torch.version.cuda else f"PyTorch {torch.__version__} is built without CUDA"
        raise UserError(
            f"the check needs an NVIDIA GPU and a PyTorch built for CUDA ({found}); run it where there is one, or try the "
            "program itself, on the torch engine, with --device cpu --engines torch"
        )
    return torch.device(name)


def engine_named(name: str, device: torch.device) -> Engine:
    """An engine on the device.

    Raises:
        EngineError: it cannot be had here.
    """
    if name == "torch":
        return Torch(device)
    if name == "onnxruntime":
        return OnnxRuntime(device=device)
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


def check_engines(names: Sequence[str], device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The engines that can be had, and of the others why not: found before anything is built for them."""
    found, missing = [], {}
    for name in names:
        try:
            engine_named(name, device)
            found.append(name)
        except EngineError as error:
            missing[name] = error.line
    return found, missing
