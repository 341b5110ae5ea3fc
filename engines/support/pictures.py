"""Pictures of any of Pillow's modes as 8-bit RGB or grey; the one way in for requests and for training data.

Pillow's own ``convert`` cuts off 16-bit grey at 255, so that such a picture becomes white, and refuses LAB.
"""

import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

__all__ = ["MOST_PIXELS", "PictureError", "open_picture", "to_grey", "to_mask", "to_rgb"]

MOST_PIXELS = 89_000_000
"""Of a picture that is read; Pillow warns of more."""
_LEVELS = 255
"""The largest of 8 bits."""


class PictureError(ValueError):
    """A picture that cannot be read, or whose meaning is not clear; says why and what to give instead."""


def open_picture(picture: Image.Image | str | Path | BinaryIO) -> Image.Image:
    """A picture from a file, turned as a camera's note in it says; or the PIL image itself. Its pixels are not read yet.

    Raises:
        PictureError: the file is missing or no picture, or there are too many pixels.
    """
    if isinstance(picture, Image.Image):
        return _bounded(picture)
    try:
        return ImageOps.exif_transpose(_bounded(_opened(picture)))
    except PictureError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever a damaged file makes them stumble over
        raise PictureError(f"cannot be read: {_reason(error)}; give a PNG or JPEG file") from error


def _opened(picture: str | Path | BinaryIO) -> Image.Image:
    if isinstance(picture, str | Path) and not Path(picture).is_file():
        Path(picture).stat()  # raises for what is missing
        raise PictureError("is not a file; give a PNG or JPEG file")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(picture)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise PictureError(f"has too many pixels; give one of at most {MOST_PIXELS // 10**6} million") from error


def _bounded(picture: Image.Image) -> Image.Image:
    if picture.width * picture.height > MOST_PIXELS:
        raise PictureError(f"has {picture.height}x{picture.width} pixels; give one of at most {MOST_PIXELS // 10**6} million")
    return picture


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture in mode RGB. What is transparent shows its colour, as with diffusers' ``load_image``.

    Raises:
        PictureError: numbers outside of what the mode's pictures have, or pixels that cannot be read.
    """
    return _converted(picture, "RGB")


def to_grey(picture: Image.Image) -> Image.Image:
    """A picture in mode L; raises as ``to_rgb``."""
    return _converted(picture, "L")


def _converted(picture: Image.Image, mode: str) -> Image.Image:
    try:
        if _is_of_numbers(picture):
            picture = _grey_from_numbers(picture)
        elif picture.mode == "LAB":
            picture = _from_lab(picture)
        elif picture.mode in {"La", "RGBa", "PA"}:
            picture = picture.convert({"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}[picture.mode])
        return picture.convert(mode)
    except PictureError:
        raise
    except Exception as error:  # as above: a file's pixels are read here
        raise PictureError(f"cannot be read: {_reason(error)}; give a PNG or JPEG file") from error


def _is_of_numbers(picture: Image.Image) -> bool:
    """Whether a picture is of one channel with more than 8 bits."""
    return picture.mode in {"I", "F"} or picture.mode.startswith("I;16")


def _grey_from_numbers(picture: Image.Image) -> Image.Image:
    """Mode L from 16-bit grey (v / 257), and from whole or floating numbers that are 16-bit, 8-bit or from 0 to 1."""
    values = np.asarray(picture, np.float64)
    least, most = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not (np.isfinite(values).all() and least >= 0 and most <= 65535):
        raise PictureError(f"has grey levels from {least:g} to {most:g}; give levels from 0 to 255, or to 65535 in 16 bits")
    if picture.mode == "F" and most <= 1:
        values = values * 255
    elif picture.mode.startswith("I;16") or most > 255:
        values = values / 257
    return Image.fromarray(np.rint(values).astype(np.uint8), "L")


def _from_lab(picture: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(picture, lab, rgb, outputMode="RGB")
    if converted is None:
        raise PictureError("is in LAB, which cannot be converted here; save it as RGB")
    return converted


def to_mask(picture: Image.Image) -> Image.Image:
    """A mask in mode L, white where to repaint.

    Levels of 0 and 1 alone mean black and white. Where the meaning is not clear, it is refused: tools disagree on whether what is
    transparent is to be repainted, and a palette's label may be a dark colour.

    Raises:
        PictureError: the mask is kept in the alpha channel, or nothing in it is white though it is not black; and as ``to_rgb``.
    """
    numbers = np.asarray(picture if _is_of_numbers(picture) else to_rgb(picture))
    brightest = numbers.max(initial=0)
    if picture.mode.startswith("I;16") and brightest <= _LEVELS:
        picture = Image.fromarray(numbers.astype(np.int32))  # in 16 bits it would be black
    grey = to_grey(picture)
    levels = np.asarray(grey)
    if picture.mode != "F" and brightest == 1:
        levels = np.where(numbers.reshape(*levels.shape, -1).any(axis=2), 255, 0).astype(np.uint8)
        grey = Image.fromarray(levels, "L")
    _check_alpha(picture, levels)
    if brightest > 0 and levels.max() < 128:
        raise PictureError(
            f"has no white: its brightest level is {levels.max()} of 255; give one that is white where to repaint, else black"
        )
    return grey


def _check_alpha(picture: Image.Image, levels: np.ndarray[Any, Any]) -> None:
    if not picture.has_transparency_data:
        return
    alpha = np.asarray(picture.convert("RGBA").getchannel("A"))
    if alpha.min(initial=255) == 255:
        return
    shown = levels * (alpha / 255.0)
    if levels.max() == levels.min() or ((levels >= 128) != (shown >= 127.5)).any():
        raise PictureError(
            "keeps its shape in the alpha channel, which some tools repaint where it is opaque and others where it is not; "
            "give one without alpha: white where to repaint, else black"
        )
