"""Hashes of files that are remembered with their sizes and times of change, so that gigabytes are not read again to find that
nothing has changed.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path

from engines.bundle.folder import sha256
from engines.support.files import write_text

__all__ = ["Digests"]

_SETTLED = 50_000_000
"""Nanoseconds. A file that changed more recently may change again without its time telling."""


class Digests:
    """SHA-256 of files by path; called with a path, it reads the file only if it is another than the one it remembers.

    Files under ``root`` are remembered by their path relative to it, so that the folder may be moved.
    """

    def __init__(self, root: Path, known: Mapping[str, list[object]] | None = None) -> None:
        self._root = root.resolve()
        self._known: dict[str, list[object]] = dict(known or {})

    @classmethod
    def load(cls, path: Path) -> "Digests":
        """Load what ``save`` wrote; start empty where there is no such file or it cannot be read."""
        try:
            known = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            known = None
        return cls(path.parent, _sound(known) if isinstance(known, dict) else None)

    def save(self, path: Path) -> None:
        """Write them down."""
        write_text(path, json.dumps(self._known, indent=1, sort_keys=True) + "\n")

    def __call__(self, path: Path) -> str:
        """SHA-256 of a file, in hexadecimal."""
        name, state = self._name(path), _state(path)
        known = self._known.get(name)
        if known is None or known[:-1] != state:
            known = [*state, sha256(path)]
            self._remember(name, known)
        return str(known[-1])

    def note(self, path: Path, digest: str) -> None:
        """Remember what a file was found to be."""
        self._remember(self._name(path), [*_state(path), digest])

    def _name(self, path: Path) -> str:
        path = path.resolve()
        return path.relative_to(self._root).as_posix() if path.is_relative_to(self._root) else str(path)

    def _remember(self, name: str, known: list[object]) -> None:
        self._known.pop(name, None)
        if time.time_ns() - int(str(known[1])) > _SETTLED:
            self._known[name] = known


def _sound(known: Mapping[str, object]) -> dict[str, list[object]]:
    """The entries that have the form of those that ``save`` writes."""
    return {name: entry for name, entry in known.items() if isinstance(entry, list) and list(map(type, entry)) == [int, int, str]}


def _state(path: Path) -> list[object]:
    """A file's size and modification time, which change when the file does."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
