"""Prompts for the models that come with the repository: `emoji`, and the small `mini` that tests use."""

import random

from tuning.checkpoints.find_source import EMBEDDED
from tuning.emoji.pairs import load_pairs, some_pairs
from tuning.mini import scenes

__all__ = ["held_back_prompts", "training_prompts"]


def training_prompts(source: str, count: int, key: str) -> list[str]:
    """So many different prompts for what an embedded model learnt, drawn by the key. Raises KeyError for another source."""
    if source == "emoji":
        return [pair.prompt for pair in some_pairs(load_pairs(EMBEDDED[source])[0], count, key)]
    generator, drawn = random.Random(key), dict[str, None]()
    while len(drawn) < count:
        drawn[scenes.caption(scenes.sample_scene(generator), generator)] = None
    return list(drawn)


def held_back_prompts(source: str, count: int, seed: int = 0) -> list[str]:
    """At most so many different prompts for what an embedded model never saw. Raises KeyError for another source.

    Seeds 0 and 1 are for published figures and for validation.
    """
    if source == "emoji":
        return [pair.prompt for pair in some_pairs(load_pairs(EMBEDDED[source])[1], count, f"held back {seed}")]
    return scenes.held_back_prompts(count, seed)
