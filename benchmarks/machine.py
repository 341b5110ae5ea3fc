"""Results as files: figures with the machine and the versions that made them."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["machine", "write_results"]

_PACKAGES = ("torch", "onnxruntime", "diffusers", "transformers", "numpy", "scipy")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, object]:
    """The processor, its cores, Python and the packages, under the keys "machine" and "versions"."""
    versions = {"python": platform.python_version()} | {p: v for p in _PACKAGES if (v := _version(p))}
    return {"machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.system()}, "versions": versions}


def write_results(path: Path, figures: Mapping[str, Any], indent: int = 2) -> None:
    """Writes figures, with the machine and the versions, as JSON; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**figures, **machine()}, indent=indent) + "\n")
