"""Files and folders that are there whole or as they were before, whenever a program is stopped.

What is still being written has a hidden name in the same folder, ``.NAME-1a2b3c4d.partial`` and the suffix. Several may write the
same file at once: the last one stays.
"""

import ctypes
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryFile

__all__ = [
    "atomic_directory",
    "atomic_file",
    "check_regular",
    "check_writable",
    "exists",
    "expanded",
    "is_file",
    "is_folder",
    "os_errors",
    "partial_directory",
    "real_path",
    "remove_partials",
    "swap_in",
    "write_bytes",
    "write_text",
]

_PARTIAL = re.compile(r"\..*-[0-9a-f]{8}\.partial(\.\w+)?")
_HERE = -100  # AT_FDCWD: relative paths are those of the process
_EXCHANGE = 2  # RENAME_EXCHANGE


def check_writable(folder: Path) -> None:
    """Raise OSError where nothing can be written into a folder, or into the one that it would be made in; leaves no trace."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        error.filename = str(there)  # not a name that nobody knows
        raise


def check_regular(path: Path) -> None:
    """Raise OSError for what is there and is no file: a device has no end, and a pipe waits for whoever writes to it."""
    if exists(path) and not is_file(path):
        raise OSError(errno.EINVAL, "it is a folder, a pipe or a device, and no file", str(path))


def expanded(name: str | Path) -> Path:
    """A path with ``~`` replaced by the user's folder; for a user that does not exist, the name as it is."""
    return Path(os.path.expanduser(name))


def exists(path: Path) -> bool:
    """Whether there is something at a path. False for a path that no file system takes, or that may not be looked at."""
    return os.path.exists(path)  # pathlib's raises OSError


def is_file(path: Path) -> bool:
    """Whether there is a regular file at a path; False where ``exists`` is."""
    return os.path.isfile(path)


def is_folder(path: Path) -> bool:
    """Whether there is a folder at a path; False where ``exists`` is."""
    return os.path.isdir(path)


def real_path(path: Path) -> Path:
    """The path with every link in it resolved; links that lead round in circles are left."""
    return Path(os.path.realpath(path))  # pathlib's raises RuntimeError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path to write to, with the suffix of ``path``, which it replaces in one move at the end.

    If anything fails, ``path`` stays as it was.
    """
    temporary = _beside(path, path.suffix)
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is not None and Path(os.fsdecode(error.filename)) == temporary:
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Raise safetensors' errors of the system as OSError: they have the system's number only in words, at a message's end."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        found = re.search(r"\(os error (\d{1,4})\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def remove_partials(path: Path) -> None:
    """Remove what killed writers of a file left beside it, or anywhere in a folder; for what one program at a time writes."""
    inside = path.is_dir()
    found = path.rglob(".*-*.partial*") if inside else path.parent.glob(f".{escape(path.stem)}-*.partial{escape(path.suffix)}")
    for left in [each for each in found if _PARTIAL.fullmatch(each.name) and each.is_file()]:
        left.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write or replace a file in one move, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write or replace a text file, in UTF-8, as ``write_bytes`` does."""
    write_bytes(path, text.encode("utf-8"))


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """A temporary folder that replaces ``folder`` at the end, and leaves no trace if anything fails, as ``partial_directory``."""
    with partial_directory(folder) as temporary:
        yield temporary
        swap_in(temporary, folder, _aside_of(temporary))


@contextmanager
def partial_directory(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder``, for what is to be moved there; at the end it is gone.

    What writers of ``folder`` that were killed have left goes first; others that are at work are let be.
    """
    from filelock import FileLock  # takes a while, and most commands write no folder

    folder.parent.mkdir(parents=True, exist_ok=True)
    _recover(folder)
    temporary = _beside(folder)
    try:
        with FileLock(_lock_of(temporary)):  # which ends with its process, however that ends
            try:
                temporary.mkdir()
                yield temporary
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    finally:
        _lock_of(temporary).unlink(missing_ok=True)


def _recover(folder: Path) -> None:
    """Remove what killed writers of a folder left beside it, and put back the old one where they had only moved it."""
    from filelock import FileLock, Timeout

    own = re.compile(rf"\.{re.escape(folder.name)}-[0-9a-f]{{8}}\.partial\.lock")
    for lock in [path for path in folder.parent.iterdir() if own.fullmatch(path.name)]:
        temporary = lock.with_suffix("")
        with suppress(Timeout), FileLock(lock, timeout=0):
            aside = _aside_of(temporary)
            if aside.exists() and not folder.exists():
                aside.rename(folder)
            for left in (temporary, aside):
                shutil.rmtree(left, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _lock_of(temporary: Path) -> Path:
    return temporary.with_name(f"{temporary.name}.lock")


def _aside_of(temporary: Path) -> Path:
    return temporary.with_name(f"{temporary.name}.old")


def swap_in(new: Path, folder: Path, aside: Path) -> None:
    """Put a new folder where another is, if there is one, which is removed; it stays if the new one cannot go there.

    Where the system can exchange two folders in one step (Linux), there is one at ``folder`` all the while. Elsewhere the old one
    is ``aside`` for a moment: whoever finds it there and none at ``folder`` moves it back.
    """
    if not folder.exists():
        new.rename(folder)
    elif _exchange(new, folder):
        new.rename(aside)
    else:
        folder.rename(aside)
        try:
            new.rename(folder)
        except BaseException:
            aside.rename(folder)
            raise
    if aside.exists():
        shutil.rmtree(aside)


def _beside(path: Path, suffix: str = "") -> Path:
    return path.with_name(f".{path.name.removesuffix(suffix)}-{token_hex(4)}.partial{suffix}")


def _exchange(one: Path, other: Path) -> bool:
    """Give two paths each other's content in one step; whether it could be done."""
    if not sys.platform.startswith("linux"):
        return False
    with suppress(OSError, AttributeError):  # a C library without it
        rename = ctypes.CDLL(None).renameat2
        # Not every file system can.
        return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)
    return False
