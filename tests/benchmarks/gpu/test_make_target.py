"""`make gpu-check` installs what the check needs where there is a GPU, and goes on without what cannot be had."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


class Machine:
    """An environment whose Python notes what it is asked to do, and fails to install TensorRT."""

    def __init__(self, folder: Path) -> None:
        self.log, self.venv, self.path = folder / "log", folder / "venv", folder / "path"
        (self.venv / "bin").mkdir(parents=True)
        self.path.mkdir()
        self.program(
            self.venv / "bin" / "python", f'echo "$@" >> {self.log}; [[ "$*" != *"[tensorrt]" && "$*" != *onnxruntime-gpu* ]]'
        )
        for stamp in (".created", ".installed-test"):  # in this order
            (self.venv / stamp).touch()

    def program(self, path: Path, text: str) -> None:
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def check(self, *arguments: str, gpu: bool = True) -> tuple[list[str], str]:
        """What Python was asked to do, and what was said."""
        self.program(self.path / "nvidia-smi", f"exit {0 if gpu else 9}")
        # Tests that make itself has started hand its job server on.
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        done = subprocess.run(
            ["make", "gpu-check", f"VENV={self.venv}", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60,
            check=False, env=outside | {"PATH": f"{self.path}:{os.environ['PATH']}"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return self.log.read_text().splitlines(), done.stderr


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_what_cannot_be_installed_is_said_and_ends_nothing(machine: Machine) -> None:
    asked, said = machine.check("PIP_ARGS=--quiet", "GPU_ARGS=--only driver")
    install = "-m pip install --quiet --constraint constraints.txt --editable"
    looks = '-c import importlib.metadata as m; m.version("onnxruntime-gpu")'
    assert asked == [
        f"{install} .[tensorrt-rtx]", f"{install} .[tensorrt]", looks, "-m benchmarks.gpu.gpu_check --only driver",
    ]  # fmt: skip
    assert said.splitlines() == [
        "make: the extra tensorrt could not be installed; the check leaves its engine out",
        "make: onnxruntime-gpu is not installed, for it overwrites onnxruntime; the check leaves ONNX Runtime out: "
        "docs/onnxruntime.md has how to include it",
    ]


def test_without_a_gpu_nothing_is_installed(machine: Machine) -> None:
    assert machine.check(gpu=False) == (["-m benchmarks.gpu.gpu_check"], "")


def test_a_dry_run_installs_nothing(machine: Machine) -> None:
    asked, _ = machine.check("GPU_ARGS=--dry-run --budget 28")
    assert asked == ["-m benchmarks.gpu.gpu_check --dry-run --budget 28"]
