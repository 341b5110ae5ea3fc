"""Results as files: figures with the machine and the versions that made them."""

import errno
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engines.support.files import check_writable, write_text

__all__ = ["machine", "results_file", "versions_of", "write_results"]

_PACKAGES = ("torch", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "diffusers", "transformers", "numpy", "scipy")


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


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    return {package: version for package in packages if (version := _version(package))}


def machine() -> dict[str, object]:
    """The processor, its cores, Python and the packages, under the keys "machine" and "versions"."""
    versions = {"python": platform.python_version()} | versions_of(_PACKAGES)
    return {"machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.system()}, "versions": versions}


def results_file(text: str) -> Path:
    """A path from a command's arguments that results can be written to, tried before anything is measured.

    Raises:
        OSError: it is a folder, or nothing can be written there.
    """
    path = Path(text)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), text)
    check_writable(path.parent)
    return path


def write_results(path: Path, figures: Mapping[str, Any], indent: int = 2) -> None:
    """Writes figures, with the machine and the versions, as JSON, in one move; makes the folder."""
    write_text(path, json.dumps({**figures, **machine()}, indent=indent) + "\n")
