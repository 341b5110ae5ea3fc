"""The finished pieces of a bundle that is being built: files under keys that say what they were made of.

A piece counts from the moment its record is written, which is after its files are; a record names each file's hash. What a build
that was stopped has left can therefore be trusted, and what it has left half-written is not taken for a piece.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from engines import Bundle
from engines.bundle.folder import MANIFEST_NAME, describe_file, is_intact
from engines.bundle.folder import sha256 as file_sha256
from engines.bundle.manifest import File
from engines.support.files import swap_in, write_bytes, write_text
from exporter.errors import BuildError

__all__ = ["Artifacts", "key_of", "pieces_of", "tidy", "working_on"]

_FILES = TypeAdapter(tuple[File, ...])
_OLD = "old"
"""The bundle that is replaced, for a moment, where two folders cannot be exchanged."""
_WHOLE = "whole"
"""Holds the hash of the finished bundle's manifest, from before the bundle is moved."""


def key_of(made_from: Mapping[str, Any]) -> str:
    """A hash of everything that a piece is made from, which JSON must be able to hold."""
    return sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def pieces_of(bundle: Bundle) -> Iterator[tuple[str, tuple[File, ...]]]:
    """The pieces of a bundle: the key of each, and its files."""
    for segment in bundle.manifest.segments:
        yield segment.key, segment.onnx
        for compiled in segment.engines.values():
            yield compiled.key, compiled.files


class Artifacts:
    """A folder that is to become a bundle, and beside it the records of what in it is finished."""

    def __init__(self, hidden: Path) -> None:
        self.hidden, self.folder, self._records = hidden, hidden / "bundle", hidden / "pieces"
        self._found: dict[str, tuple[File, ...]] = {}
        for folder in (self.folder, self._records):
            folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(list(self._records.glob("[!.]*.json")))

    def find(self, key: str) -> tuple[File, ...] | None:
        """The files of a piece, if it is finished and all of them are whole."""
        if key not in self._found:
            try:
                files = _FILES.validate_json(self._record(key).read_bytes())
            except (OSError, ValidationError):
                return None
            if not all(is_intact(self.folder, file) for file in files):
                return None
            self._found[key] = files
        return self._found[key]

    def add(self, key: str, paths: Iterable[Path]) -> tuple[File, ...]:
        """Record a piece whose files have been written."""
        return self._note(key, tuple(describe_file(self.folder, path) for path in paths))

    def reuse(self, key: str, folder: Path, files: tuple[File, ...]) -> None:
        """Take over a piece that another folder holds, unless it is here or is not whole there.

        The folder stays as it is: its files get a second name, or copies where they can't.
        """
        if self.find(key) is None and all(is_intact(folder, file) for file in files):
            for file in files:
                _link(folder / file.path, self.folder / file.path)
            self._note(key, files)

    def prune(self, keys: Iterable[str]) -> None:
        """Remove every file that belongs to none of these pieces, so that writing later changes no file of another bundle."""
        found = [self.find(key) for key in keys]
        wanted = {self.folder / file.path for files in found for file in files or ()}
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in wanted:
                path.unlink()

    def _record(self, key: str) -> Path:
        return self._records / f"{key}.json"

    def _note(self, key: str, files: tuple[File, ...]) -> tuple[File, ...]:
        write_bytes(self._record(key), _FILES.dump_json(files))
        self._found[key] = files
        return files


@contextmanager
def working_on(folder: Path) -> Iterator[Artifacts]:
    """The pieces that are to become a bundle at ``folder``, in a hidden folder beside it.

    At the end they become the bundle. If the work stops before that, finished ones stay for the next build.

    Raises:
        BuildError: another build is at work there.
    """
    hidden = _hidden(folder)
    is_new = not folder.parent.exists()
    hidden.mkdir(parents=True, exist_ok=True)
    with _lock(hidden, folder):
        _recover(hidden, folder)
        pieces = Artifacts(hidden)
        done = False
        try:
            yield pieces
            write_text(hidden / _WHOLE, _manifest_hash(pieces.folder))
            swap_in(pieces.folder, folder, hidden / _OLD)
            done = True
        finally:
            if done or not len(pieces):
                shutil.rmtree(hidden)
            if is_new and not any(folder.parent.iterdir()):
                folder.parent.rmdir()


def tidy(folder: Path) -> None:
    """Finish what a build that was killed in its last moves has left beside its bundle; others keep what they have finished."""
    hidden = _hidden(folder)
    if not hidden.is_dir():
        return
    with suppress(BuildError, OSError), _lock(hidden, folder):  # another build is at work there, or nothing can be written
        _recover(hidden, folder)
        if _is_in_place(hidden, folder):
            shutil.rmtree(hidden)


def _hidden(folder: Path) -> Path:
    """The hidden folder beside ``folder`` in which its bundle is built."""
    return folder.parent / f".{folder.name}.building"


def _recover(hidden: Path, folder: Path) -> None:
    """Where two moves were needed and a build was killed between them, the old bundle is put back."""
    aside = hidden / _OLD
    if aside.exists():
        shutil.rmtree(aside) if folder.exists() else aside.rename(folder)


def _is_in_place(hidden: Path, folder: Path) -> bool:
    """Whether the bundle that was built in the hidden folder ``hidden`` is the one at ``folder``."""
    whole = hidden / _WHOLE
    return whole.is_file() and whole.read_text("utf-8") == _manifest_hash(folder) != ""


def _manifest_hash(folder: Path) -> str:
    """Of a bundle's manifest; empty where there is none."""
    path = folder / MANIFEST_NAME
    return file_sha256(path) if path.is_file() else ""


@contextmanager
def _lock(hidden: Path, folder: Path) -> Iterator[None]:
    """Lock the hidden folder ``hidden``; the lock ends with its process, however that ends."""
    lock = FileLock(hidden / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BuildError(f"another build is writing {folder}; wait for it, or choose another --out") from error
    try:
        yield
    finally:
        lock.release()


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
