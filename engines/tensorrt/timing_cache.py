"""Kernel timings that TensorRT took while it built, kept for later builds on the card: like layers are not timed again."""

import contextlib
from pathlib import Path
from typing import Any

from engines.support.files import write_bytes

__all__ = ["TimingCache"]


class TimingCache:
    """A file beside bundles, not in one: those of a folder share it, for their layers are often alike.

    The library checks what it is given: what is damaged, or of another card or version, counts as empty.

    Args:
        path: of the file; its name has the version of TensorRT and the card.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def attach(self, config: Any) -> Any:
        """Let a builder's configuration use the cache as it is on disk; returns it, to be kept until the engine is built."""
        for data in (self._read(), b""):
            cache = config.create_timing_cache(data)
            if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
                return cache
        return None

    def store(self, config: Any, cache: Any) -> None:
        """Write an attached cache after a build, with what other processes have written meanwhile; no harm if it cannot be."""
        if cache is None:
            return
        others = config.create_timing_cache(self._read())
        if others is not None:
            cache.combine(others, ignore_mismatch=False)
        with contextlib.suppress(OSError):
            write_bytes(self._path, bytes(cache.serialize()))

    def _read(self) -> bytes:
        try:
            return self._path.read_bytes()
        except OSError:
            return b""
