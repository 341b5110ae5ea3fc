"""Kernels that TensorRT-RTX finished for the card at hand, kept on disk: the second start does not compile them again."""

import contextlib
import os
import tempfile
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["RuntimeCache", "cache_places", "user_folder", "write_whole"]


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


class RuntimeCache:
    """The runtime cache of all execution contexts of a bundle.

    The library checks what it is given: what was made for another card, driver or version, or is damaged, is refused whole, and
    kernels are compiled as if there were none.
    """

    def __init__(self, places: Sequence[Path]) -> None:
        self._places = tuple(places)
        self._cache: Any = None
        self._stored = 0
        self._lock = threading.Lock()

    def attach(self, config: Any) -> None:
        """Let a runtime configuration use the cache, which is read from disk the first time."""
        with self._lock:
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                self._read()
        config.set_runtime_cache(self._cache)

    def store(self) -> None:
        """Write the cache, if it has grown, at the first place that can be written."""
        with self._lock:
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
