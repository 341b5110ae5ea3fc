"""An index of the pieces that builds on this machine have made: a piece that is in one bundle is not made again for another.

By a piece's key, a note names a bundle's folder, the piece's files and their hashes. Notes lie with the user's caches, where only
builds write, so a bundle that came from elsewhere is in none. A piece whose files have changed is not taken. The note of a piece
that is gone is removed.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from engines import Bundle
from engines.bundle.manifest import File
from engines.support.caches import user_cache
from engines.support.files import write_text
from engines.support.records import Record
from exporter.segments.artifacts import Artifacts, pieces_of

__all__ = ["note", "reuse"]


class _Note(Record):
    """Where a piece lies: a bundle's folder, and the files in it."""

    folder: Path
    files: tuple[File, ...]


def note(bundle: Bundle) -> None:
    """Remember the pieces of a bundle that was built here. Where the caches cannot be written, nothing is remembered."""
    folder = bundle.folder.resolve()
    for key, files in pieces_of(bundle):
        with suppress(OSError):
            _path_of(key).parent.mkdir(parents=True, exist_ok=True)
            write_text(_path_of(key), _Note(folder=folder, files=files).model_dump_json() + "\n")


def reuse(pieces: Artifacts, wanted: Iterable[str], replaced: Path) -> None:
    """Take over what is wanted and was built before; notes of what is gone are removed.

    Args:
        pieces: of the bundle that is being built.
        wanted: their keys.
        replaced: the folder at its path, which may hold such pieces too, though it was built elsewhere or has been moved.
    """
    for key in wanted:
        with suppress(OSError, ValidationError):
            found = _Note.model_validate_json(_path_of(key).read_bytes())
            for folder in (found.folder, replaced):
                pieces.reuse(key, folder, found.files)
            if pieces.find(key) is None:
                _path_of(key).unlink()


def _path_of(key: str) -> Path:
    return user_cache() / "pieces" / f"{key}.json"
