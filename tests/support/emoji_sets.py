"""Emoji sets of a few plain shapes, in the form that `fetch` leaves them in."""

import gzip
import json
from pathlib import Path

from tuning.emoji.concepts import STYLES

__all__ = ["COLOURS", "CONCEPTS", "write_sets"]

CONCEPTS = ("red-apple", "blue-heart", "green-tree", "gold-medal", "grey-wolf")
COLOURS = dict(zip(CONCEPTS, ("#ff0000", "#0000ff", "#00aa00", "#ddaa00", "#888888"), strict=True))


def write_sets(folder: Path, concepts: tuple[str, ...] = CONCEPTS) -> Path:
    """Each concept is a square in its colour that fills its set's box; flags, buttons and a hidden one are to be left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, style in enumerate(STYLES):
        side = 16 * (number + 1)
        icons: dict[str, dict[str, object]] = {
            name: {"body": f'<rect width="{side}" height="{side}" fill="{COLOURS[name]}"/>'} for name in concepts
        }
        icons |= {name: {"body": "<g/>"} for name in ("flag-france", "play-button", "waving-hand-light-skin-tone")}
        icons["secret"] = {"body": "<g/>", "hidden": True}
        parts = {
            "icons": {"icons": icons, "width": side, "height": side},
            "metadata": {"categories": {"Objects": [*icons]}},
        }
        (folder / f"{style}.json.gz").write_bytes(gzip.compress(json.dumps(parts).encode()))
    return folder
