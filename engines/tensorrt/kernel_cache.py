"""Kernels that TensorRT-RTX finished for the card at hand, kept on disk: the second start does not compile them again."""

import contextlib
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.support.files import write_bytes

__all__ = ["RuntimeCache"]


class RuntimeCache:
    """The runtime cache of all execution contexts of a bundle.

    The library checks what it is given: what was made for another card, driver or version, or is damaged, is refused whole, and
    kernels are compiled as if there were none.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
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
        """Write the cache, if it has grown, to the first of its paths that can be written."""
        with self._lock:
            if not self._grown:
                return
            self._grown = False
            blob = None if self._cache is None else self._cache.serialize()
            data = b"" if blob is None else bytes(blob)
            if len(data) <= self._stored:
                return
            self._stored = len(data)
            for path in self._paths:
                with contextlib.suppress(OSError):
                    write_bytes(path, data)
                    return

    def _read(self) -> None:
        for path in self._paths:
            try:
                data = path.read_bytes()
            except OSError:
                continue
            if self._cache.deserialize(data):
                self._stored = len(data)
                return
            warnings.warn(f"{path} is damaged or of another driver; kernels are compiled again", stacklevel=2)
