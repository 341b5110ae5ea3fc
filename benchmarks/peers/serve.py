"""A process that holds one subject and makes a picture each time it is asked, by lines of JSON on its standard input and output.

It runs in whatever environment the subject needs, so it imports nothing of this project but ``benchmarks.peers``.
"""

import contextlib
import importlib.metadata
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["Call", "Made", "main"]


_PACKAGES = (
    "torch", "numpy", "diffusers", "transformers", "onnxruntime", "openvino", "optimum", "optimum-onnx", "optimum-intel",
    "DeepCache", "stable-fast", "tensorrt", "tensorrt-rtx",
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A picture that is asked for: ``plan`` is read by this project's own subjects only."""

    prompt: str
    steps: int
    guidance: float
    seed: int
    height: int
    width: int
    images: int = 1
    plan: str = "full"


@dataclass
class Made:
    """The result of a call: arrays, and seconds by part; of the UNet by step, with the kind of each."""

    latents: Any
    pictures: Any
    text: float
    vae: float
    unet: list[tuple[str, float]] = field(default_factory=list)
    segments: list[tuple[str, float, float]] = field(default_factory=list)
    """Where they were asked for: segments, with the seconds since the call at which each started and ended."""


def _peak_mb() -> float | None:
    """The most memory that the process held since it was last asked, in MB; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, StopIteration):
        return None
    return peak / 1024


def _device_mb() -> float | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    free, total = torch.cuda.mem_get_info()
    return float(total - free) / 2**20


def _answer(make: Callable[[Call], Made], request: dict[str, Any], folder: Path) -> dict[str, Any]:
    _peak_mb()
    started, cpu = time.perf_counter(), time.process_time()
    made = make(Call(**request))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    answer: dict[str, Any] = {"seconds": seconds, "cpu": cpu, "peak_mb": _peak_mb(), "device_mb": _device_mb()}
    for name in ("latents", "pictures"):
        path = folder / f"{os.getpid()}-{name}.npy"
        np.save(path, np.asarray(getattr(made, name)))
        answer[name] = str(path)
    return answer | {name: value for name, value in asdict(made).items() if name in {"text", "vae", "unet", "segments"}}


def _told(error: BaseException) -> dict[str, str]:
    said = " ".join(str(error).split())[:400]
    return {"error": f"{type(error).__name__}: {said}" if said else type(error).__name__}


def _versions() -> dict[str, str]:
    """Of the packages that decide what is measured, where they are installed in this process's environment."""
    found: dict[str, str] = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _exported(adapter: ModuleType, folder: Path, work: Path) -> Path:
    """Where the files are that an adapter loads: they are written by a process of its own, whose memory is not the subject's."""
    exported = work / adapter.__name__.rpartition(".")[2]
    if not exported.exists():
        unfinished = exported.with_suffix(".unfinished")  # `engines`, which has a function for it, may not be there
        shutil.rmtree(unfinished, ignore_errors=True)
        with ProcessPoolExecutor(1, get_context("spawn"), _print_to_stderr) as pool:
            pool.submit(adapter.export, folder, unfinished).result()
        unfinished.rename(exported)
    return exported


def _print_to_stderr() -> None:
    os.dup2(2, 1)


def main(module: str, folder: str, options: str) -> None:
    """Load a subject, say so, and answer until the input ends. What libraries print goes to the standard error."""
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        settings = json.loads(options)
        try:
            adapter = importlib.import_module(f"benchmarks.peers.{module}")
            path = _exported(adapter, Path(folder), Path(settings["work"])) if hasattr(adapter, "export") else Path(folder)
            started = time.perf_counter()
            make = adapter.load(path, settings)
        except Exception as error:
            traceback.print_exc()
            print(json.dumps(_told(error)), file=out, flush=True)
            return
        about = {"load_seconds": time.perf_counter() - started, "versions": _versions()}
        print(json.dumps(about), file=out, flush=True)
        for line in sys.stdin:
            try:
                answer = _answer(make, json.loads(line), Path(settings["scratch"]))
            except Exception as error:
                traceback.print_exc()
                answer = _told(error)
            print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
