"""Scenes of one or two plain objects, their captions in English, and the parser from a caption to what it asks for.

A scene is the whole truth about a picture; a caption tells some or all of it. One scene in twenty is held back, chosen
by a stable hash of the scene itself (not of the caption), so that no wording of a held-back scene is ever trained on.
"""

import hashlib
import random
import re
from dataclasses import dataclass

__all__ = [
    "BACKGROUND_DEFAULT",
    "COLOURS",
    "PLACES",
    "SHAPES",
    "SIZES",
    "Asked",
    "AskedObject",
    "Scene",
    "SceneObject",
    "caption",
    "held_back",
    "held_back_prompts",
    "parse",
    "sample_scene",
]

# Colour name -> sRGB. Far apart from each other even after the renderer's jitter.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 35),
    "green": (30, 155, 50),
    "blue": (40, 70, 220),
    "yellow": (245, 220, 45),
    "purple": (155, 50, 190),
    "cyan": (60, 215, 225),
    "white": (244, 244, 244),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
# Size name -> the longer side of the object's box in pixels of a 64 px picture.
SIZES: dict[str, int] = {"small": 22, "medium": 30, "large": 40}
# Place name -> direction from the centre (x to the right, y down).
PLACES: dict[str, tuple[int, int]] = {
    "centre": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}
PAIRS = (("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top"))
BACKGROUND_DEFAULT = ("white", "black")  # what a caption without a background gets; black when an object is white
HELD_BACK_ONE_IN = 20

_SIZE_WORDS = {"small": ("small", "small", "little"), "large": ("large", "large", "big")}
_RELATIONS = {"left": "to the left of", "right": "to the right of", "top": "above", "bottom": "below"}
_PREFIXES = ("", "", "", "a picture of ", "a drawing of ", "an image of ")


@dataclass(frozen=True)
class SceneObject:
    """One object: names from COLOURS, SHAPES, SIZES and PLACES."""

    colour: str
    shape: str
    size: str = "medium"
    place: str = "centre"


@dataclass(frozen=True)
class Scene:
    """One object anywhere, or two of medium size side by side or above one another, on a plain background."""

    objects: tuple[SceneObject, ...]
    background: str

    def key(self) -> str:
        """A stable text for hashing; the order of two objects does not count."""
        parts = sorted(f"{o.colour} {o.shape} {o.size} {o.place}" for o in self.objects)
        return " + ".join(parts) + f" on {self.background}"


@dataclass(frozen=True)
class AskedObject:
    """One object as a caption asks for it; None where it leaves the choice to the model."""

    colour: str
    shape: str
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Asked:
    """A scene as a caption asks for it; background None where the caption names none."""

    objects: tuple[AskedObject, ...]
    background: str | None = None


def held_back(scene: Scene) -> bool:
    """Whether training must never see this scene."""
    return hashlib.sha256(scene.key().encode()).digest()[0] * HELD_BACK_ONE_IN // 256 == 0


def _draw(rng: random.Random) -> Scene:
    background = rng.choice(list(COLOURS))
    colours = [c for c in COLOURS if c != background]
    if rng.random() < 0.65:
        size, place = rng.choice(list(SIZES)), rng.choice(list(PLACES))
        if rng.random() < 0.15:
            size, place = "medium", "centre"
        return Scene((SceneObject(rng.choice(colours), rng.choice(SHAPES), size, place),), background)
    pair = PAIRS[0] if rng.random() < 0.4 else rng.choice(PAIRS)
    objects = tuple(SceneObject(rng.choice(colours), rng.choice(SHAPES), "medium", place) for place in pair)
    return Scene(objects, background)


def sample_scene(rng: random.Random, *, held: bool = False) -> Scene:
    """Draws a scene of the training part (`held` False) or of the held-back part; all from `rng`."""
    while True:
        scene = _draw(rng)
        if held_back(scene) == held:
            return scene


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _noun(obj: SceneObject, rng: random.Random) -> str:
    size = f"{rng.choice(_SIZE_WORDS[obj.size])} " if obj.size in _SIZE_WORDS else ""
    return _article(f"{size}{obj.colour} {obj.shape}")


def _where(place: str, rng: random.Random) -> str:
    if place == "centre":
        return rng.choice((" in the centre", " in the middle", " in the center"))
    if " " in place:
        return rng.choice((f" at the {place}", f" in the {place} corner", f" in the {place}"))
    if place in ("left", "right"):
        return rng.choice((f" on the {place}", f" at the {place}"))
    return f" at the {place}"


def _one(obj: SceneObject, rng: random.Random) -> str:
    default = obj.place == "centre"
    return _noun(obj, rng) + ("" if default and rng.random() < 0.75 else _where(obj.place, rng))


def _two(first: SceneObject, second: SceneObject, rng: random.Random) -> str:
    a, b = _noun(first, rng), _noun(second, rng)
    if first.place == "left" and rng.random() < 0.6:
        return f"{a} and {b}"
    if rng.random() < 0.5:
        return f"{a} {_RELATIONS[first.place]} {b}"
    return f"{a}{_where(first.place, rng)} and {b}{_where(second.place, rng)}"


def caption(scene: Scene, rng: random.Random) -> str:
    """Says the scene in English, one wording out of many. What it leaves out is at its default in the scene."""
    objects = scene.objects
    words = _one(objects[0], rng) if len(objects) == 1 else _two(objects[0], objects[1], rng)
    if scene.background == default_background(scene.objects) and rng.random() < 0.2:
        return rng.choice(_PREFIXES) + words
    background = scene.background
    ending = rng.choice((f" on a {background} background",) * 4 + (f" on {background}", f", {background} background"))
    return rng.choice(_PREFIXES) + words + ending


def default_background(objects: tuple[SceneObject, ...]) -> str:
    """The background of a caption that names none."""
    white, black = BACKGROUND_DEFAULT
    return black if any(o.colour == white for o in objects) else white


_COLOUR = "|".join(COLOURS)
_OBJECT = re.compile(rf"(?:(small|little|large|big) )?({_COLOUR}) ({'|'.join(SHAPES)})s?\b([^,]*?)(?=,| and an? |$)")
_BACKGROUND = re.compile(rf"(?: on an? |, | on )({_COLOUR})(?: background)?$")
_PLACE = re.compile(r"\b(?:at|in|on) the (top left|top right|bottom left|bottom right|left|right|top|bottom|cent|middle)")
_RELATION = re.compile(rf" ({'|'.join(_RELATIONS.values())}) (?=an? )")
_OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


def parse(text: str) -> Asked:
    """Reads what a caption asks for. Objects it can't read are missing from the result; it never raises."""
    text = text.strip().lower().rstrip(".")
    background = None
    if found := _BACKGROUND.search(text):
        background, text = found[1], text[: found.start()]
    relation = None
    if found := _RELATION.search(text):
        relation = next(place for place, words in _RELATIONS.items() if words == found[1])
        text = f"{text[: found.start()]} and {text[found.end() :]}"
    objects = []
    for size, colour, shape, rest in _OBJECT.findall(text):
        place = _PLACE.search(rest)
        where = {"cent": "centre", "middle": "centre"}.get(place[1], place[1]) if place else None
        kind = next((name for name, words in _SIZE_WORDS.items() if size in words), None)
        objects.append(AskedObject(colour, shape, kind, where))
    if relation and len(objects) == 2:
        places = (relation, _OPPOSITE[relation])
        objects = [AskedObject(o.colour, o.shape, o.size, p) for o, p in zip(objects, places, strict=True)]
    return Asked(tuple(objects), background)


def held_back_prompts(n: int = 500, seed: int = 0) -> list[str]:
    """A seeded list of `n` different captions of held-back scenes, none of which training can see."""
    rng = random.Random(f"held-back {seed}")
    prompts: dict[str, None] = {}
    while len(prompts) < n:
        prompts[caption(sample_scene(rng, held=True), rng)] = None
    return list(prompts)
