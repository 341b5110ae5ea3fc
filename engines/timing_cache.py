"""What TensorRT measured of kernels while it built, kept for later builds on a card: like layers are not measured again."""

import contextlib
from typing import Any

from engines.runtime_cache import user_folder, write_whole

__all__ = ["TimingCache"]


class TimingCache:
    """A file among the user's caches, not in a bundle: bundles share it, for their layers are often alike.

    The library checks what it is given: what is damaged, or of another card or version, counts as empty.

    Args:
        name: of the file; it names the version of TensorRT and the card.
    """

    def __init__(self, name: str) -> None:
        self._place = user_folder() / "timing" / name

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
            write_whole(self._place, bytes(cache.serialize()))

    def _read(self) -> bytes:
        try:
            return self._place.read_bytes()
        except OSError:
            return b""
