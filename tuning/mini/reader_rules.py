"""Reads a picture back by rules: what objects it shows, of which colour, shape, size and place, on what background.

The background is the median of the border; what differs from it forms connected parts; a part's colour is the nearest
palette colour, its box gives size and place, and its shape is the template that overlaps best once both fill their box.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from tuning.mini.render import shape_mask
from tuning.mini.scenes import COLOURS, PLACES, SHAPES, SIZES

__all__ = ["Seen", "SeenObject", "read"]

Pixels = npt.NDArray[np.uint8]
_CELLS = 24  # templates are compared on a grid of this many cells per side
_CONTRAST = 50.0  # a pixel this far from the background (Euclidean sRGB) belongs to an object
_SMALLEST = 0.012  # parts below this share of the picture are specks
_CENTRAL = 0.094  # an object this near to the middle, as a share of the side, is neither left nor right


@dataclass(frozen=True)
class SeenObject:
    """One object as read; `x`, `y` are its box's centre and `extent` its longer side, as shares of the picture."""

    colour: str
    shape: str
    size: str
    place: str
    x: float
    y: float
    extent: float


@dataclass(frozen=True)
class Seen:
    """A picture as read; objects from left to right, then from top to bottom."""

    objects: tuple[SeenObject, ...]
    background: str


@cache
def _templates() -> dict[str, npt.NDArray[np.bool_]]:
    return {shape: shape_mask(shape, _CELLS) for shape in SHAPES}


@cache
def _aspects() -> dict[str, float]:
    """Width over height of each shape's box."""
    from tuning.mini.render import shape_aspect

    return {shape: shape_aspect(shape) for shape in SHAPES}


def _colour(rgb: npt.NDArray[np.floating]) -> str:
    return min(COLOURS, key=lambda name: float(np.sum((np.asarray(COLOURS[name]) - rgb) ** 2)))


def _shape(mask: npt.NDArray[np.bool_]) -> str:
    """The shape whose template overlaps best (intersection over union, less for a box of another aspect)."""
    box = Image.fromarray(mask).convert("L").resize((_CELLS, _CELLS), Image.Resampling.BOX)
    seen = np.asarray(box) > 127
    aspect = mask.shape[1] / mask.shape[0]

    def score(shape: str) -> float:
        template = _templates()[shape]
        overlap = float((seen & template).sum() / max(1, (seen | template).sum()))
        return overlap - 0.3 * abs(math.log(aspect / _aspects()[shape]))

    return max(SHAPES, key=score)


def _place(x: float, y: float) -> str:
    def side(at: float) -> int:
        return 0 if abs(at - 0.5) < _CENTRAL else (1 if at > 0.5 else -1)

    direction = (side(x), side(y))
    return next(name for name, value in PLACES.items() if value == direction)


def _size(extent: float) -> str:
    return min(SIZES, key=lambda name: abs(SIZES[name] / 64 - extent))


def _object(pixels: Pixels, part: npt.NDArray[np.bool_]) -> SeenObject:
    from scipy import ndimage

    rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = part.shape
    core = ndimage.binary_erosion(part)
    colour = _colour(np.median(pixels[core if core.any() else part].astype(float), axis=0))
    x, y = (left + right) / 2 / width, (top + bottom) / 2 / height
    extent = max((right - left) / width, (bottom - top) / height)
    shape = _shape(part[top:bottom, left:right])
    return SeenObject(colour, shape, _size(extent), _place(x, y), x, y, extent)


def _half_edge(part: npt.NDArray[np.bool_], distance: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Moves a part's outline to where its own contrast has fallen to a half."""
    from scipy import ndimage

    if part.mean() < _SMALLEST:
        return part
    inner = part & (distance > 0.5 * float(np.quantile(distance[part], 0.75)))
    labels, count = ndimage.label(inner, structure=np.ones((3, 3)))
    return inner if count < 2 else labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))


def read(picture: Image.Image | Pixels) -> Seen:
    """Reads an RGB picture of any size (bytes of height x width x 3)."""
    from scipy import ndimage

    pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    edge = max(1, len(pixels) // 64)
    border = [pixels[:edge], pixels[-edge:], pixels[:, :edge], pixels[:, -edge:]]
    background = np.median(np.concatenate([b.reshape(-1, 3) for b in border]).astype(float), axis=0)
    distance = np.sqrt(((pixels.astype(float) - background) ** 2).sum(-1))
    parts, count = ndimage.label(distance > _CONTRAST, structure=np.ones((3, 3)))
    masks = [_half_edge(parts == i + 1, distance) for i in range(count)]
    objects = [_object(pixels, m) for m in masks if m.mean() > _SMALLEST]
    return Seen(tuple(sorted(objects, key=lambda o: (round(o.x, 1), o.y))), _colour(background))
