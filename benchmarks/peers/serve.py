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


class _DeviceMemory:
    """What a process takes of a card's memory, from what is free there before and after the work that it does.

    All else stands still meanwhile: subjects take turns. So other processes are not in it; nor is the CUDA context, which is made
    before the first look. Where the card is shared with strangers, what they take or give back in between is in it.
    """

    def __init__(self, cuda: bool) -> None:
        self._cuda, self._mb, self._before = cuda, 0.0, 0.0

    def start(self) -> None:
        """Look before some work."""
        self._before = self._free()

    def stop(self) -> float | None:
        """Look after it; returns the MB that the process has taken until now, None without a card."""
        self._mb += self._before - self._free()
        return self._mb if self._cuda else None

    def _free(self) -> float:
        if not self._cuda:
            return 0.0
        import torch

        torch.cuda.synchronize()
        return float(torch.cuda.mem_get_info()[0]) / 2**20


def _answer(make: Callable[[Call], Made], request: dict[str, Any], folder: Path, memory: _DeviceMemory) -> dict[str, Any]:
    _peak_mb()
    memory.start()
    started, cpu = time.perf_counter(), time.process_time()
    made = make(Call(**request))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    answer: dict[str, Any] = {"seconds": seconds, "cpu": cpu, "peak_mb": _peak_mb(), "device_mb": memory.stop()}
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


def _exported(adapter: ModuleType, folder: Path, settings: dict[str, Any]) -> Path:
    """Where the files are that an adapter loads: they are written by a process of its own, whose memory is not the subject's.

    They are named after the adapter, and after the options in its ``EXPORTED_FOR``, which they depend on.
    """
    kept = [str(settings[name]) for name in getattr(adapter, "EXPORTED_FOR", ())]
    exported = Path(settings["work"]) / "-".join([adapter.__name__.rpartition(".")[2], *kept])
    if not exported.exists():
        unfinished = exported.with_name(f"{exported.name}.unfinished")  # `engines`, which has a function for it, may not be there
        shutil.rmtree(unfinished, ignore_errors=True)
        with ProcessPoolExecutor(1, get_context("spawn"), _print_to_stderr) as pool:
            pool.submit(adapter.export, folder, unfinished, settings).result()
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
            path = _exported(adapter, Path(folder), settings) if hasattr(adapter, "export") else Path(folder)
            memory = _DeviceMemory(settings["device"] == "cuda")
            memory.start()
            started = time.perf_counter()
            make = adapter.load(path, settings)
            memory.stop()
        except Exception as error:
            traceback.print_exc()
            print(json.dumps(_told(error)), file=out, flush=True)
            return
        about = {"load_seconds": time.perf_counter() - started, "versions": _versions()}
        print(json.dumps(about), file=out, flush=True)
        for line in sys.stdin:
            try:
                answer = _answer(make, json.loads(line), Path(settings["scratch"]), memory)
            except Exception as error:
                traceback.print_exc()
                answer = _told(error)
            print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
