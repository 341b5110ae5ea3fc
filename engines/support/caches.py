"""Where caches lie: beside what they are for, or with the user's other caches where that cannot be written."""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from platformdirs import user_cache_path

from engines.support.files import expanded

__all__ = ["cache_paths", "card_name", "first_writable", "prune", "user_cache"]


def user_cache() -> Path:
    """The folder of caches that belong to a user: ``$UNET_HEIRLOOM_CACHE``, or one where the system has them.

    On Linux that is in ``$XDG_CACHE_HOME``, or else in ``~/.cache``.
    """
    if chosen := os.environ.get("UNET_HEIRLOOM_CACHE"):
        return expanded(chosen)
    return user_cache_path("unet-heirloom", appauthor=False)


def cache_paths(bundle: Path, key: str, name: str) -> tuple[Path, ...]:
    """The paths at which a bundle's cache may lie: beside its engines, or with the user's caches.

    Args:
        bundle: the bundle's folder.
        key: the bundle's own, from its manifest.
        name: of the file; it names the card and the version that the kernels are for.
    """
    return bundle / "cache" / name, user_cache() / key[:16] / name


def card_name(device: torch.device) -> str:
    """The GPU's name, fit for a file's."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def first_writable(folders: Sequence[Path]) -> Path | None:
    """The first of these folders that can be made and written into, which is there afterwards; None if none can."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    return None


def prune(folder: Path, most: int) -> None:
    """Remove those files of a folder of small caches that were written first, where there are more than ``most``."""
    paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if len(paths) > most:
        with contextlib.suppress(OSError):  # another process removes them as well
            for path in sorted(paths, key=lambda path: path.stat().st_mtime)[: len(paths) - most]:
                path.unlink(missing_ok=True)
