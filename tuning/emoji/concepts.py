"""Emoji as training data: five open sets from the npm registry, which of their pictures are used, and captions for them.

A picture is one concept (`cooked rice`) in one style (`twitter`). Of some 150 concepts one style is held back, chosen by a stable
hash: training sees the concept and the style, never together, and quality is measured on those pairs.
"""

import gzip
import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuning.errors import TuningError

__all__ = [
    "BACKGROUNDS",
    "PLACES",
    "SETS",
    "SIZES",
    "STYLES",
    "Drawing",
    "Icon",
    "Pair",
    "caption",
    "held_back",
    "load_icons",
    "split",
]


@dataclass(frozen=True)
class IconSet:
    """A package of the npm registry: its pinned version, its file's SHA-256, and the licence of its pictures."""

    package: str
    version: str
    sha256: str
    licence: str
    authors: str


SETS: dict[str, IconSet] = {
    "noto": IconSet(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        "Google Inc",
    ),
    "fluent": IconSet(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        "Microsoft Corporation",
    ),
    "firefox": IconSet(
        "@iconify-json/fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0",
        "Mozilla",
    ),
    "twitter": IconSet(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "Twitter, Inc and other contributors",
    ),
    "emojione": IconSet(
        "@iconify-json/emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
        "Emoji One",
    ),
}
"""By the style's name in captions. OpenMoji (CC BY-SA 4.0) is left out: whether its share-alike clause reaches weights that
learned from its pictures is open, and the committed weights are Apache-2.0."""
STYLES = tuple(SETS)

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (24, 24, 24),
    "grey": (150, 150, 150),
    "red": (226, 60, 60),
    "orange": (245, 160, 50),
    "yellow": (250, 225, 90),
    "green": (90, 180, 90),
    "blue": (70, 120, 225),
    "purple": (150, 90, 200),
    "pink": (250, 170, 200),
}
SIZES = {"small": 0.5, "": 0.92, "large": 1.1}
"""Size word -> the drawing's side as a share of the picture's."""
PLACES = {"": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
"""Place word of small drawings -> direction from the centre (x to the right, y down)."""

HELD_BACK = 150
_LEAST_STYLES = 3
_CATEGORIES = {
    "Activities", "Animals & Nature", "Food & Drink", "Objects", "Smileys & Emotion", "Travel & Places",
    "Food", "Nature", "Travel",
}  # fmt: skip
_LEFT_OUT = re.compile(
    r"skin|flag|keycap|regional|input-|couple|family|kiss-|button|arrow|clock|-oclock|square|letter|mahjong|ideograph|symbol"
    r"|digit|number|japanese|circled|heavy-|-hand|hands|speech|bubble|sign|person|man-|woman|people|men-|women|boy|girl"
    r"|face-with-(?!tears|thermometer|medical|monocle|head)|face-in|eyes-|smiling-eyes|face-(blowing|savoring|holding|exhaling|vomiting)"
    r"|thirty|quarter-moon|crescent-moon|gibbous|moon-symbol|new-moon|backhand|selector|chart|card-index|bookmark-tabs"
)


@dataclass(frozen=True)
class Pair:
    """A concept in a style."""

    concept: str
    style: str

    @property
    def key(self) -> str:
        """Its name among all."""
        return f"{self.style}/{self.concept}"

    @property
    def prompt(self) -> str:
        """The prompt for its picture."""
        return f"{self.concept}, {self.style} style"


@dataclass(frozen=True)
class Icon(Pair):
    """A pair's picture as SVG."""

    svg: str


@dataclass(frozen=True)
class Drawing:
    """An icon as a picture shows it: names from BACKGROUNDS, SIZES and PLACES."""

    concept: str
    style: str
    background: str = "white"
    size: str = ""
    place: str = ""


def load_icons(folder: Path) -> list[Icon]:
    """The pictures that are used, of concepts that at least three sets draw; sorted by concept and style.

    Raises:
        TuningError: a set is missing or damaged.
    """
    bodies: dict[str, dict[str, str]] = defaultdict(dict)
    categories: dict[str, str] = {}
    for style in STYLES:
        path = folder / f"{style}.json.gz"
        if not path.is_file():
            raise TuningError(f"{path} is missing; fetch the emoji first: python -m tuning.emoji.fetch")
        parts = _read(path)
        for category, names in parts["metadata"].get("categories", {}).items():
            for name in names:
                categories.setdefault(name, category)
        for name, icon in parts["icons"]["icons"].items():
            if not icon.get("hidden"):
                bodies[name][style] = _svg(parts["icons"], icon)
    _join_squashed(bodies)
    chosen = [
        name
        for name, found in sorted(bodies.items())
        if len(found) >= _LEAST_STYLES and categories.get(name) in _CATEGORIES and not _LEFT_OUT.search(name)
    ]
    return [Icon(name.replace("-", " "), style, svg) for name in chosen for style, svg in sorted(bodies[name].items())]


def _read(path: Path) -> dict[str, Any]:
    try:
        parts: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
        if not isinstance(parts["icons"]["icons"], dict) or not isinstance(parts["metadata"], dict):
            raise ValueError("no icons")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise TuningError(f"{path} cannot be read ({error}); delete it and run python -m tuning.emoji.fetch") from error
    return parts


def _join_squashed(bodies: dict[str, dict[str, str]]) -> None:
    """Firefox's set writes names without hyphens: those are given to the concept that they mean."""
    whole = {name.replace("-", ""): name for name in sorted(bodies) if "-" in name}
    for name in list(bodies):
        target = whole.get(name)
        if target and set(bodies[name]) == {"firefox"}:
            bodies[target].setdefault("firefox", bodies.pop(name)["firefox"])


def _svg(icons: dict[str, Any], icon: dict[str, Any]) -> str:
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    left, top = icon.get("left", 0), icon.get("top", 0)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def held_back(icons: Sequence[Icon]) -> set[str]:
    """Keys of the pictures that training never sees: one style each of HELD_BACK concepts that four sets or more draw."""
    styles: dict[str, list[str]] = defaultdict(list)
    for icon in icons:
        styles[icon.concept].append(icon.style)
    concepts = sorted((concept for concept, found in styles.items() if len(found) > _LEAST_STYLES), key=_hash)[:HELD_BACK]
    return {f"{min(styles[concept], key=lambda style: _hash(f'{style} {concept}'))}/{concept}" for concept in concepts}


def split(icons: Iterable[Icon]) -> tuple[list[Icon], list[Icon]]:
    """The pictures for training, and those held back."""
    every = list(icons)
    held = held_back(every)
    return [icon for icon in every if icon.key not in held], [icon for icon in every if icon.key in held]


def caption(drawing: Drawing, rng: random.Random) -> str:
    """Words for a drawing; style and background are left out now and then, but not a background that is not white."""
    named = " ".join(filter(None, (drawing.size, drawing.concept)))
    text = f"{rng.choice(('a ', 'a ', ''))}{named}"
    if drawing.place:
        text += f" on the {drawing.place}" if drawing.place in {"left", "right"} else f" at the {drawing.place}"
    if drawing.background != "white" or rng.random() < 0.3:
        text += f" on a {drawing.background} background"
    if rng.random() < 0.85:
        text = f"{text}, {drawing.style} style" if rng.random() < 0.8 else f"{drawing.style} style {text}"
    return text
