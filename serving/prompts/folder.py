"""Pictures of lines as PNG files in a folder: their names, and whether they are there already."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from PIL import Image

from runtime.generation import numbered, write_png
from serving.prompts.lines import Asked
from serving.queueing.ticket import Made

__all__ = ["is_there", "mark_in", "paths_for", "write"]

_MARK = "request"
"""The text in a file that tells which line, as it then was, it was made from."""


def paths_for(folder: Path, number: int, pictures: int) -> list[Path]:
    """The files of a line's pictures: ``00000012.png``, several as ``00000012-00.png`` and so on."""
    return numbered(folder / f"{number:08}.png", pictures)


def is_there(folder: Path, asked: Asked, marks: Mapping[str, str]) -> bool:
    """Whether all pictures of a line are there, made from the line as it is now.

    Args:
        folder: for PNG files.
        asked: the line.
        marks: of pictures that lie elsewhere, by the names of their files; those in the folder were made later.
    """
    paths = paths_for(folder, asked.number, asked.request.images)
    return all((mark_in(path) if path.exists() else marks.get(path.name)) == asked.fingerprint for path in paths)


def mark_in(picture: Path | IO[bytes]) -> str | None:
    """The fingerprint in a PNG file of the line that it was made from; its pixels are not read."""
    try:
        with Image.open(picture, formats=["PNG"]) as image:
            found = image.info.get(_MARK)
    except (OSError, ValueError, SyntaxError):  # no picture
        return None
    return found if isinstance(found, str) else None


def write(folder: Path, asked: Asked, made: Made) -> Sequence[Path]:
    """Write the pictures of a line, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = paths_for(folder, asked.number, len(made.images))
    for path, image, told in zip(paths, made.images, made.made_from, strict=True):
        write_png(path, image, {**told, _MARK: asked.fingerprint})
    return paths
