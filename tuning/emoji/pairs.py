"""Which pairs of concept and style a model learnt, and which were held back from it: kept beside its weights, in `pairs.json`.

So its pictures can be asked for and judged without the sets that it learnt from.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from engines.support.files import write_text
from tuning.emoji.concepts import Pair
from tuning.errors import TuningError

__all__ = ["load_pairs", "save_pairs", "some_pairs"]

_FILE = "pairs.json"
_SEEN, _HELD = "seen", "held back"


def save_pairs(seen: Iterable[Pair], held: Iterable[Pair], folder: Path) -> None:
    """Writes both into a model folder."""
    write_text(folder / _FILE, json.dumps({_SEEN: _by_style(seen), _HELD: _by_style(held)}, indent=0) + "\n")


def load_pairs(folder: Path) -> tuple[list[Pair], list[Pair]]:
    """Pairs that the model of a folder learnt, and those held back; sorted by style and concept.

    Raises TuningError where the folder does not say.
    """
    try:
        found = json.loads((folder / _FILE).read_text("utf-8"))
        seen, held = (
            [Pair(concept, style) for style in sorted(found[kind]) for concept in sorted(found[kind][style])]
            for kind in (_SEEN, _HELD)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TuningError(
            f"{folder / _FILE} does not say which emoji the model learnt ({error}); give the folder of a model that "
            "python -m tuning.emoji.train wrote"
        ) from error
    return seen, held


def some_pairs(pairs: Sequence[Pair], count: int, key: str) -> list[Pair]:
    """So many of them, all where there are fewer, drawn by the key; the first few of more are the same."""
    shuffled = list(pairs)
    random.Random(key).shuffle(shuffled)
    return shuffled[:count]


def _by_style(pairs: Iterable[Pair]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for pair in pairs:
        found[pair.style].append(pair.concept)
    return {style: sorted(found[style]) for style in sorted(found)}
