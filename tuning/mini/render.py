"""Renders scenes to 64 x 64 pictures: signed distances sampled per pixel, so that edges are anti-aliased.

Each shape is drawn once at high resolution and turned into a table of signed distances; a picture then costs one
look-up per pixel and object. Colours, sizes and positions get a little jitter from the caller's generator.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from tuning.mini.scenes import COLOURS, PLACES, SIZES, Scene, SceneObject

__all__ = ["IMAGE_SIZE", "Boxes", "render", "render_boxes", "shape_aspect", "shape_mask"]

Boxes = list[list[tuple[float, float, float]]]
IMAGE_SIZE = 64
_TABLE = 192  # cells per side of a distance table
_REACH = 1.25  # the table covers [-_REACH, _REACH] in units of half the object's size
_DRAWN = 768  # pixels per side of the drawing behind a table
_PAIR_SIZE, _PAIR_OFFSET = 26, 17  # px: size and distance from the centre of each object of a pair
_EDGE = 3.0  # px kept free between an object and the picture's border
_COLOUR_JITTER, _SIZE_JITTER, _PLACE_JITTER = 10.0, 0.04, 1.0  # levels of 255; share; px


def _regular(points: int, inner: float | None) -> list[tuple[float, float]]:
    """A regular polygon with its tip up, or a star when `inner` gives the radius between two tips."""
    count = points if inner is None else 2 * points
    angles = -np.pi / 2 + 2 * np.pi * np.arange(count) / count
    radii = np.where((np.arange(count) % 2 == 1) & (inner is not None), inner or 1.0, 1.0)
    return [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, angles, strict=True)]


def _polygon(points: list[tuple[float, float]]) -> npt.NDArray[np.bool_]:
    """Fills a polygon, moved and scaled so that its longer side spans [-1, 1]."""
    xy = np.array(points)
    low, high = xy.min(0), xy.max(0)
    xy = (xy - (low + high) / 2) / ((high - low).max() / 2)
    image = Image.new("1", (_DRAWN, _DRAWN))
    ImageDraw.Draw(image).polygon([tuple(p) for p in (xy / _REACH + 1) * _DRAWN / 2], fill=1)
    return np.asarray(image, dtype=bool)


def _heart() -> list[tuple[float, float]]:
    t = np.linspace(0, 2 * np.pi, 200)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return list(zip((16 * np.sin(t) ** 3).tolist(), (-y).tolist(), strict=True))


def _draw(shape: str) -> npt.NDArray[np.bool_]:
    axis = (np.arange(_DRAWN) + 0.5) / _DRAWN * 2 * _REACH - _REACH
    x, y = np.meshgrid(axis, axis)
    disc = x**2 + y**2 <= 1
    arm = 0.34
    masks = {
        "circle": disc,
        "square": (abs(x) <= 1) & (abs(y) <= 1),
        "ring": disc & (x**2 + y**2 >= 0.55**2),
        "cross": ((abs(x) <= arm) & (abs(y) <= 1)) | ((abs(y) <= arm) & (abs(x) <= 1)),
        "moon": ((x + 0.2) ** 2 + y**2 <= 1) & ((x - 0.42) ** 2 + y**2 >= 0.85**2),
    }
    polygons = {
        "triangle": [(-1.0, 0.85), (1.0, 0.85), (0.0, -0.9)],
        "star": _regular(5, 0.45),
        "heart": _heart(),
    }
    mask = masks[shape] if shape in masks else _polygon(polygons[shape])
    if shape == "moon":  # centre its box
        columns = np.flatnonzero(mask.any(0))
        mask = np.roll(mask, (_DRAWN - 1 - columns[0] - columns[-1]) // 2, axis=1)
    return mask


@cache
def _distances(shape: str) -> npt.NDArray[np.float32]:
    """(_TABLE, _TABLE) signed distances, negative inside, in units of half the object's size."""
    from scipy.ndimage import distance_transform_edt

    mask = _draw(shape)
    pixel = 2 * _REACH / _DRAWN
    signed = (distance_transform_edt(~mask) - distance_transform_edt(mask)) * pixel
    step = _DRAWN // _TABLE
    table: npt.NDArray[np.float32] = signed.reshape(_TABLE, step, _TABLE, step).mean((1, 3)).astype(np.float32)
    return table


def shape_mask(shape: str, size: int) -> npt.NDArray[np.bool_]:
    """(size, size) mask of a shape stretched to fill its box, as a template to compare with."""
    mask = _draw(shape)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = Image.fromarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    return np.asarray(box.resize((size, size), Image.Resampling.NEAREST), dtype=bool)


def _layout(obj: SceneObject, pair: bool, rng: np.random.Generator) -> tuple[float, float, float]:
    """Centre x, centre y and size of an object in pixels, with jitter."""
    size = (_PAIR_SIZE if pair else SIZES[obj.size]) * (1 + _SIZE_JITTER * rng.uniform(-1, 1))
    offset = _PAIR_OFFSET if pair else IMAGE_SIZE / 2 - _EDGE - size / 2
    dx, dy = PLACES[obj.place]
    shift = rng.uniform(-_PLACE_JITTER, _PLACE_JITTER, 2)
    return IMAGE_SIZE / 2 + dx * offset + shift[0], IMAGE_SIZE / 2 + dy * offset + shift[1], size


def _coverage(shape: str, x: float, y: float, size: float) -> npt.NDArray[np.float32]:
    """(64, 64) share of each pixel that the object covers."""
    axis = np.arange(IMAGE_SIZE) + 0.5
    scale = _TABLE / (size * _REACH)

    def cells(centre: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        at = np.clip((axis - centre) * scale + _TABLE / 2 - 0.5, 0, _TABLE - 1.001)
        low = at.astype(np.int64)
        return low, (at - low).astype(np.float32)

    (row, fy), (column, fx) = cells(y), cells(x)
    table = _distances(shape)
    rows = table[row] * (1 - fy)[:, None] + table[row + 1] * fy[:, None]
    distance = rows[:, column] * (1 - fx) + rows[:, column + 1] * fx
    return np.clip(0.5 - distance * np.float32(size / 2), 0, 1)


def _jittered(colour: str, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    rgb = np.array(COLOURS[colour]) + rng.uniform(-_COLOUR_JITTER, _COLOUR_JITTER, 3)
    return np.clip(rgb, 0, 255).astype(np.float32)


def render_boxes(scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[npt.NDArray[np.uint8], Boxes]:
    """Renders scenes to (n, 64, 64, 3) sRGB bytes; also gives centre x, centre y and size in px of each object."""
    images = np.empty((len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    boxes: Boxes = []
    for i, scene in enumerate(scenes):
        picture = np.broadcast_to(_jittered(scene.background, rng), (IMAGE_SIZE, IMAGE_SIZE, 3))
        boxes.append([])
        for obj in scene.objects:
            box = _layout(obj, len(scene.objects) > 1, rng)
            alpha = _coverage(obj.shape, *box)[..., None]
            picture = picture + (_jittered(obj.colour, rng) - picture) * alpha
            boxes[-1].append(box)
        images[i] = np.rint(picture)
    return images, boxes


def render(scenes: Sequence[Scene], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Renders scenes to (n, 64, 64, 3) sRGB bytes."""
    return render_boxes(scenes, rng)[0]


def shape_aspect(shape: str) -> float:
    """Width over height of a shape's box."""
    mask = _draw(shape)
    return float(mask.any(0).sum() / mask.any(1).sum())
