"""Captions say what scenes hold, the parser reads them back, and held-back scenes stay unseen."""

import random

import pytest

from tuning.mini.data import batch
from tuning.mini.scenes import (
    Asked,
    AskedObject,
    Scene,
    SceneObject,
    caption,
    default_background,
    held_back,
    held_back_prompts,
    parse,
    sample_scene,
)


def test_every_wording_is_read_back_as_its_scene() -> None:
    rng = random.Random(3)
    for _ in range(4000):
        scene = sample_scene(rng)
        text = caption(scene, rng)
        asked = parse(text)
        assert [(o.colour, o.shape) for o in asked.objects] == [(o.colour, o.shape) for o in scene.objects], text
        for want, told in zip(scene.objects, asked.objects, strict=True):
            assert (told.size or "medium") == want.size, text
            assert told.place in (None, want.place), text
            assert told.place or want.place in ("centre", "left", "right"), text
        assert (asked.background or default_background(scene.objects)) == scene.background, text


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("a red star on a blue background", Asked((AskedObject("red", "star"),), "blue")),
        (
            "a small green circle at the top left on a yellow background",
            Asked((AskedObject("green", "circle", "small", "top left"),), "yellow"),
        ),
        (
            "A red star and a blue square on a white background.",
            Asked((AskedObject("red", "star"), AskedObject("blue", "square")), "white"),
        ),
        (
            "a black moon below a cyan heart",
            Asked((AskedObject("black", "moon", None, "bottom"), AskedObject("cyan", "heart", None, "top")), None),
        ),
        ("a dog", Asked((), None)),
    ],
)
def test_parser(text: str, asked: Asked) -> None:
    assert parse(text) == asked


def test_training_never_draws_a_held_back_scene() -> None:
    rng = random.Random(5)
    assert not any(held_back(sample_scene(rng)) for _ in range(5000))
    scenes, _, _ = batch(300, "diffusion 0 0 0")
    assert not any(held_back(scene) for scene in scenes)


def test_held_back_is_a_twentieth_and_does_not_depend_on_the_order_of_objects() -> None:
    rng = random.Random(7)
    from tuning.mini.scenes import _draw

    share = sum(held_back(_draw(rng)) for _ in range(8000)) / 8000
    assert 0.04 < share < 0.06
    a, b = SceneObject("red", "star", "medium", "left"), SceneObject("blue", "ring", "medium", "right")
    assert Scene((a, b), "white").key() == Scene((b, a), "white").key()


def test_held_back_prompts_are_seeded_and_different() -> None:
    prompts = held_back_prompts(500, seed=0)
    assert prompts == held_back_prompts(500, seed=0)
    assert prompts != held_back_prompts(500, seed=1)
    assert len(set(prompts)) == 500
    rng = random.Random(1)
    seen = {caption(sample_scene(rng), rng) for _ in range(30000)}
    # A caption that leaves the place out can't collide either: what is left out is at its default.
    assert not seen & set(prompts)
