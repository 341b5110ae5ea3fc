"""Pictures of lines as PNG files in a folder: their names, and whether they are there already."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from runtime.generation import numbered, write_png
from serving.prompts.lines import Asked
from serving.queueing.ticket import Made

__all__ = ["is_there", "paths_for", "write"]

_MARK = "request"
"""The text in a file that tells which line, as it then was, it was made from."""


def paths_for(folder: Path, number: int, pictures: int) -> list[Path]:
    """The files of a line's pictures: ``00000012.png``, several as ``00000012-00.png`` and so on."""
    return numbered(folder / f"{number:08}.png", pictures)


def is_there(folder: Path, asked: Asked) -> bool:
    """Whether all pictures of a line are in a folder, made from the line as it is now."""
    return all(_mark_of(path) == asked.fingerprint for path in paths_for(folder, asked.number, asked.request.images))


def _mark_of(path: Path) -> str | None:
    try:
        with Image.open(path, formats=["PNG"]) as image:  # reads the texts, not the pixels
            found = image.info.get(_MARK)
    except (OSError, ValueError, SyntaxError):  # not there, or no picture
        return None
    return found if isinstance(found, str) else None


def write(folder: Path, asked: Asked, made: Made) -> Sequence[Path]:
    """Write the pictures of a line, each whole or not at all."""
    paths = paths_for(folder, asked.number, len(made.images))
    for path, image, told in zip(paths, made.images, made.made_from, strict=True):
        write_png(path, image, {**told, _MARK: asked.fingerprint})
    return paths
