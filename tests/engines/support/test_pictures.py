"""Pictures as people have them: every mode of Pillow, 16-bit grey, masks in alpha, damaged and huge files."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.support.pictures import PictureError, open_picture, to_grey, to_mask, to_rgb
from tests.support.diffusers_pipelines import mask, picture
from tests.support.pictures import GREY_MODES, RGB_MODES, in_mode, sixteen_bits


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.int32)


# Other colour spaces have 8 bits per channel, too, so that there and back a level is one of several; on average over all pixels.
ALLOWED = {"YCbCr": 2, "HSV": 2, "LAB": 3}


@pytest.mark.parametrize("mode", RGB_MODES)
def test_a_coloured_picture_of_any_mode(mode: str) -> None:
    got = to_rgb(in_mode(mode))
    assert got.mode == "RGB"
    assert np.abs(levels(got) - levels(picture())).mean() <= ALLOWED.get(mode, 0)


@pytest.mark.parametrize("mode", GREY_MODES)
def test_a_grey_picture_of_any_mode(mode: str) -> None:
    grey = picture().convert("L")
    expected = grey.convert("1").convert("L") if mode == "1" else grey
    for got in (to_grey(in_mode(mode)), to_rgb(in_mode(mode)).convert("L")):
        assert np.abs(levels(got) - levels(expected)).max() <= (1 if mode == "La" else 0)


def test_sixteen_bits_are_divided_by_257_whatever_the_file(tmp_path: Path) -> None:
    numbers = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    expected = np.rint(numbers / 257).astype(np.int32)
    for name in ("a.png", "a.tiff"):
        sixteen_bits(numbers).save(tmp_path / name)
        got = to_rgb(open_picture(tmp_path / name))
        assert np.array_equal(levels(got)[..., 1], expected)
    assert len(np.unique(expected)) == 256, "not clipped: every level is there"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 200]], np.int32), [0, 200]),
        (np.array([[0, 25700]], np.int32), [0, 100]),
        (np.array([[0.0, 0.5]], np.float32), [0, 128]),
        (np.array([[0.0, 200.0]], np.float32), [0, 200]),
    ],
)
def test_whole_and_floating_numbers_are_read_by_their_range(values: np.ndarray, expected: list[int]) -> None:
    assert levels(to_grey(Image.fromarray(values))).tolist() == [expected]


@pytest.mark.parametrize("values", [[[-1, 3]], [[0, 70000]], [[float("nan"), 0.0]], [[float("inf"), 0.0]]])
def test_levels_that_no_picture_has_are_refused(values: list[list[float]]) -> None:
    kind = np.int32 if isinstance(values[0][0], int) else np.float32
    with pytest.raises(PictureError, match="has grey levels from"):
        to_rgb(Image.fromarray(np.array(values, kind)))


def bilevel(white: int) -> np.ndarray:
    return (levels(mask()) >= 128).astype(np.uint8) * white


def test_masks_are_read_as_meant() -> None:
    expected = bilevel(255)
    palette = Image.fromarray(bilevel(1), "P")
    palette.putpalette([0, 0, 0, 255, 255, 255])
    white = Image.new("RGBA", mask().size, (255, 255, 255, 255))
    clear = Image.composite(white, Image.new("RGBA", mask().size, (0, 0, 0, 0)), mask())
    given = {
        "0 and 255": Image.fromarray(bilevel(255)),
        "0 and 1": Image.fromarray(bilevel(1)),
        "one bit": Image.fromarray(bilevel(255)).convert("1"),
        "16 bits": sixteen_bits(bilevel(1).astype(np.uint16) * 65535),
        "16 bits of 0 and 1": sixteen_bits(bilevel(1).astype(np.uint16)),
        "16 bits of 0 and 255": sixteen_bits(bilevel(255).astype(np.uint16)),
        "whole numbers": Image.fromarray(bilevel(1).astype(np.int32)),
        "0 and 1 in red": Image.merge("RGB", [Image.fromarray(bilevel(1)), *(Image.new("L", mask().size) for _ in range(2))]),
        "palette": palette,
        "floating": Image.fromarray(bilevel(1).astype(np.float32)),
        "coloured": Image.fromarray(bilevel(255)).convert("RGB"),
        "opaque": Image.fromarray(bilevel(255)).convert("RGBA"),
        "white on nothing": clear,
    }
    for name, image in given.items():
        assert np.array_equal(levels(to_mask(image)) >= 128, expected >= 128), name
    black = Image.new("L", (8, 8))
    assert levels(to_mask(black)).max() == 0


def test_masks_whose_meaning_is_not_clear_are_refused() -> None:
    painted = Image.new("RGBA", mask().size, (0, 0, 0, 255))
    painted.putalpha(mask())
    inverse = Image.new("RGBA", mask().size, (255, 255, 255, 255))
    inverse.putalpha(mask())
    for image in (painted, inverse):
        with pytest.raises(PictureError, match="keeps its shape in the alpha channel"):
            to_mask(image)
    labels = Image.fromarray(bilevel(1), "P")
    labels.putpalette([0, 0, 0, 128, 0, 0])  # as segmentation tools write them
    with pytest.raises(PictureError, match="has no white: its brightest level is 38 of 255"):
        to_mask(labels)


@pytest.mark.parametrize(
    "image",
    [
        sixteen_bits(bilevel(1).astype(np.uint16) * 7),
        Image.merge("RGB", [Image.new("L", mask().size), Image.new("L", mask().size), Image.fromarray(bilevel(3))]),
        Image.fromarray(bilevel(1).astype(np.float32) * 0.001),
    ],
    ids=["numbers of things, in 16 bits", "numbers of things, in blue", "nearly nothing"],
)
def test_a_mask_that_would_be_read_as_black_though_it_is_not_is_refused(image: Image.Image) -> None:
    with pytest.raises(PictureError, match="has no white: its brightest level is [07] of 255"):
        to_mask(image)


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG file of that size, with no pixels in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_picture_of_too_many_pixels_is_refused_before_they_are_read(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(width, height))
    with pytest.raises(PictureError, match="has too many pixels|pixels; give one of at most 89 million|cannot be read"):
        to_rgb(open_picture(tmp_path / "bomb.png"))
    with pytest.raises(PictureError, match="10000x10000 pixels; give one of at most 89 million"):
        open_picture(Image.new("1", (10_000, 10_000)))


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty.png").touch()
    picture().save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    for name in ("pipe.png", "empty.png", "half.png", "gone.png", ".", "nul\0.png"):
        with pytest.raises(PictureError) as refusal:
            to_rgb(open_picture(tmp_path / name))
        assert len(str(refusal.value).splitlines()) == 1


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    """Bytes changed at random, seeded: an error of ours, or a picture; nothing else comes out."""
    generator = np.random.default_rng(7)
    for suffix in ("png", "jpg", "gif", "bmp", "tiff", "webp"):
        path = tmp_path / f"a.{suffix}"
        picture().save(path)
        data = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(20):
            changed = data.copy()
            changed[generator.integers(0, len(data), 5)] = generator.integers(0, 256, 5)
            path.write_bytes(changed.tobytes())
            try:
                assert to_rgb(open_picture(path)).mode == "RGB"
            except PictureError as error:
                message = str(error)
                assert message.splitlines() == [message]
