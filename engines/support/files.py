"""A folder that takes its place whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_directory", "swap_in"]


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes ``folder``'s place at the end, and leaves no trace if anything fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        swap_in(temporary, folder, temporary.with_name(f"{temporary.name}.old"))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def swap_in(new: Path, folder: Path, aside: Path) -> None:
    """Put a new folder in the place of another, if there is one; that one stays if the new one cannot go there.

    A rename cannot replace a full folder: for a moment the old one is ``aside``.
    """
    if not folder.exists():
        new.rename(folder)
        return
    folder.rename(aside)
    try:
        new.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    shutil.rmtree(aside)
