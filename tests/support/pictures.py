"""Pictures in every mode that Pillow knows, with what each should be read as."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageCms

from tests.support.diffusers_pipelines import picture

RGB_MODES = ("RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "P", "RGBa")
GREY_MODES = ("L", "LA", "La", "PA", "1", "I", "F", "I;16", "I;16L", "I;16B")


def in_mode(mode: str) -> Image.Image:
    """The same picture in another mode; 16-bit numbers are 257 times the 8-bit ones."""
    coloured, grey = picture(), picture().convert("L")
    levels = np.asarray(grey)
    if mode == "LAB":
        made = ImageCms.profileToProfile(
            coloured, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
        assert made is not None
        return made
    if mode.startswith("I;16"):
        return sixteen_bits(levels.astype(np.uint16) * 257, mode)
    if mode == "I":
        return Image.fromarray(levels.astype(np.int32) * 257)
    if mode == "F":
        return Image.fromarray(levels.astype(np.float32) / 255)
    if mode in {"La", "PA"}:
        return grey.convert("LA").convert(mode) if mode == "La" else grey.convert("P").convert("PA")
    if mode == "P":
        return coloured.convert("P", palette=Image.Palette.ADAPTIVE)
    if mode == "RGBa":
        return coloured.convert("RGBA").convert("RGBa")
    return (coloured if mode in RGB_MODES else grey).convert(mode)


def sixteen_bits(levels: np.ndarray[tuple[int, ...], np.dtype[np.uint16]], mode: str = "I;16") -> Image.Image:
    """A 16-bit grey picture, in the byte order that its mode says."""
    order = ">u2" if mode.endswith("B") else "<u2"
    return Image.frombytes(mode, (levels.shape[1], levels.shape[0]), levels.astype(order).tobytes())
