"""Kernels that TensorRT-RTX finished for the card at hand, kept on disk: the second start does not compile them again."""

import contextlib
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["RuntimeCache", "cache_places", "card_name", "user_folder", "writable", "write_whole"]


def user_folder() -> Path:
    """Where caches lie that belong to a user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unet-heirloom"


def cache_places(bundle: Path, key: str, name: str) -> tuple[Path, ...]:
    """Where a bundle's cache may lie: beside its engines, or with the user's caches where the bundle cannot be written.

    Args:
        bundle: the bundle's folder.
        key: the bundle's own, from its manifest.
        name: of the file; it names the card and the version that the kernels are for.
    """
    return bundle / "cache" / name, user_folder() / key[:16] / name


def card_name(device: torch.device) -> str:
    """The GPU's name, fit for a file's."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def writable(places: Sequence[Path]) -> Path | None:
    """The first of these folders that can be made and written into, which is there afterwards; None if none can."""
    for place in places:
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return place
    return None


class RuntimeCache:
    """The runtime cache of all execution contexts of a bundle.

    The library checks what it is given: what was made for another card, driver or version, or is damaged, is refused whole, and
    kernels are compiled as if there were none.
    """

    def __init__(self, places: Sequence[Path]) -> None:
        self._places = tuple(places)
        self._cache: Any = None
        self._stored = 0
        self._grown = False
        self._lock = threading.Lock()

    def attach(self, config: Any) -> Any:
        """Let a runtime configuration use the cache, which is read from disk the first time; the library's own object."""
        with self._lock:
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                self._read()
        config.set_runtime_cache(self._cache)
        return self._cache

    def note(self) -> None:
        """Some kernels may have been compiled: the next ``store`` is to look. To write them down takes time."""
        self._grown = True

    def store(self) -> None:
        """Write the cache, if it has grown, at the first place that can be written."""
        with self._lock:
            if not self._grown:
                return
            self._grown = False
            blob = None if self._cache is None else self._cache.serialize()
            data = b"" if blob is None else bytes(blob)
            if len(data) <= self._stored:
                return
            self._stored = len(data)
            for place in self._places:
                with contextlib.suppress(OSError):
                    write_whole(place, data)
                    return

    def _read(self) -> None:
        for place in self._places:
            try:
                data = place.read_bytes()
            except OSError:
                continue
            if self._cache.deserialize(data):
                self._stored = len(data)
                return
            warnings.warn(f"{place} is damaged or of another driver; kernels are compiled again", stacklevel=2)


def write_whole(place: Path, data: bytes) -> None:
    """Write a file whole or not at all: another process may read it at this moment."""
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=".")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.replace(temporary, place)
    except BaseException:
        os.unlink(temporary)
        raise
