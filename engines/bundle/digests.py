"""SHA-256 of files. Those of large files are remembered, so that gigabytes are not read again to find that nothing has changed.

What is remembered lies with the user's caches, where nobody else writes: a folder that came from elsewhere can bring nothing
along that is believed. A file is the one that was read while its path, inode, size and both of its times are: that of its
content's last change, which any program can set, and that of its entry's, which on Linux and macOS only the system sets (Windows
has none).
"""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from engines.support.caches import prune, user_cache
from engines.support.files import real_path, write_text

__all__ = ["Digest", "fresh_sha256", "known_sha256", "note_sha256", "sha256"]

Digest = Callable[[Path], str]
"""SHA-256 of a file, in hexadecimal."""

_SMALL = 2**20
"""Bytes. Smaller files are read sooner than what is remembered of them."""
_SETTLED = 2_000_000_000
"""Nanoseconds. A file that changed more recently may change again without its times telling: those of some systems are coarse."""
_MOST_FOLDERS = 1000


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """As ``sha256``; a large file is not read if it is the one that was read before."""
    before = _state(path)
    if before[1] < _SMALL:
        return sha256(path)
    known = _read(_note_of(path)).get(real_path(path).name)
    return str(known[-1]) if known is not None and known[:-1] == before else fresh_sha256(path)


def fresh_sha256(path: Path) -> str:
    """As ``sha256``, of a file that is read whatever is remembered; what it is found to be is remembered."""
    before = _state(path)
    found = sha256(path)
    if _state(path) == before:
        note_sha256(path, found)
    return found


def note_sha256(path: Path, digest: str, *, settled: bool = False) -> None:
    """Remember what a file was found to be; where the caches cannot be written, nothing is.

    Whoever knows that no program will change the file soon says that it is ``settled``.
    """
    state, note = _state(path), _note_of(path)
    if state[1] < _SMALL:
        return
    folder, name = real_path(path).parent, real_path(path).name
    known = {other: entry for other, entry in _read(note).items() if other != name and (folder / other).exists()}
    if settled or time.time_ns() - max(state[2:]) > _SETTLED:
        known[name] = [*state, digest]
    with suppress(OSError):
        write_text(note, json.dumps(known, indent=1, sort_keys=True) + "\n")
        prune(note.parent, _MOST_FOLDERS)


def _note_of(path: Path) -> Path:
    """The file in which a folder's hashes are remembered."""
    folder = str(real_path(path).parent).encode("utf-8", "surrogateescape")
    return user_cache() / "digests" / f"{hashlib.sha256(folder).hexdigest()[:32]}.json"


def _read(note: Path) -> dict[str, list[object]]:
    """The notes on a folder's files, by name: inode, size, both times and hash. Empty where the notes are damaged."""
    with suppress(OSError, ValueError, RecursionError):
        known = json.loads(note.read_bytes())
        if isinstance(known, dict):
            return {name: entry for name, entry in known.items() if isinstance(entry, list) and len(entry) == 5}
    return {}


def _state(path: Path) -> list[int]:
    """Inode, size, and the times of the last change of content and entry, in nanoseconds: what changes when the file does."""
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
