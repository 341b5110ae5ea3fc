"""The rule reader reads what the renderer draws, and judging compares it with what a caption asks."""

import numpy as np
from PIL import Image

from tuning.mini.data import batch, to_bytes
from tuning.mini.reader_rules import Seen, SeenObject, read
from tuning.mini.reader_score import asked_of, judge, shares
from tuning.mini.render import IMAGE_SIZE, render_boxes
from tuning.mini.scenes import SHAPES, Scene, SceneObject, parse


def seen(colour: str, shape: str, x: float, y: float, size: str = "medium", place: str = "centre") -> SeenObject:
    return SeenObject(colour, shape, size, place, x, y, 0.4)


def test_the_rule_reader_is_always_right_on_renders() -> None:
    scenes, _, pictures = batch(1500, "reader test")
    figures = shares(judge(asked_of(s), read(p)) for s, p in zip(scenes, to_bytes(pictures), strict=True))
    assert figures == dict.fromkeys(figures, 1.0)


def test_the_rule_reader_reads_other_sizes_too() -> None:
    scenes, _, pictures = batch(100, "larger")
    larger = [Image.fromarray(p).resize((128, 128), Image.Resampling.BICUBIC) for p in to_bytes(pictures)]
    figures = shares(judge(asked_of(s), read(p)) for s, p in zip(scenes, larger, strict=True))
    assert figures["all"] >= 0.99


def test_boxes_are_where_the_pixels_are() -> None:
    rng = np.random.default_rng(0)
    scenes = [Scene((SceneObject("red", shape, "large", "top left"),), "white") for shape in SHAPES]
    pictures, boxes = render_boxes(scenes, rng)
    for picture, [(x, y, size)] in zip(pictures, boxes, strict=True):
        red = picture[..., 1] < 140
        rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
        assert abs((columns[0] + columns[-1] + 1) / 2 - x) < 1
        assert abs((rows[0] + rows[-1] + 1) / 2 - y) < 1
        assert abs(max(np.ptp(rows), np.ptp(columns)) + 1 - size) <= 1.5
        assert picture.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)


def test_an_empty_picture_shows_nothing() -> None:
    assert read(np.full((64, 64, 3), 250, np.uint8)) == Seen((), "white")


def test_judging() -> None:
    asked = parse("a small red star at the top left on a blue background")
    right = Seen((seen("red", "star", 0.2, 0.2, "small", "top left"),), "blue")
    assert all(judge(asked, right).values())
    other = Seen((seen("red", "heart", 0.2, 0.5, "small", "left"),), "white")
    assert {k for k, v in judge(asked, other).items() if not v} == {"shape", "place", "background"}
    none = judge(asked, Seen((), "blue"))
    assert none["background"]
    assert not any(v for k, v in none.items() if k != "background")


def test_two_objects_are_matched_by_place_and_colours_must_not_be_swapped() -> None:
    star, square = seen("red", "star", 0.2, 0.5, place="left"), seen("blue", "square", 0.8, 0.5, place="right")
    asked = parse("a red star to the left of a blue square on a white background")
    assert all(judge(asked, Seen((star, square), "white")).values())
    swapped = parse("a red star to the right of a blue square on a white background")
    assert not judge(swapped, Seen((star, square), "white"))["colour"]
    bound = parse("a blue star and a red square on a white background")
    assert not judge(bound, Seen((star, square), "white"))["colour"]
    assert judge(bound, Seen((star, square), "white"))["shape"]
    anyhow = parse("a blue square and a red star on a white background")
    assert all(judge(anyhow, Seen((star, square), "white")).values())


def test_what_is_not_asked_for_is_right() -> None:
    assert all(judge(parse("a red star"), Seen((seen("red", "star", 0.9, 0.9, "large", "bottom right"),), "cyan")).values())
