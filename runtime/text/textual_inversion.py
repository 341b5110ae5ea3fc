"""Textual inversion (Gal et al., arXiv 2208.01618): words with embeddings of their own, in the tokenizer and the text encoder.

A word of several vectors is several tokens: ``<cat>``, ``<cat>_1``, ``<cat>_2``. A prompt names the first alone; as in diffusers'
pipelines the others follow it.
"""

import re
from typing import Any

__all__ = ["expand_words"]


def expand_words(prompt: str, tokenizer: Any) -> str:
    """The prompt with all tokens of each word of several vectors in it."""
    added = tokenizer.added_tokens_encoder
    for word in dict.fromkeys(tokenizer.tokenize(prompt)):
        tokens = [word]
        while (following := f"{word}_{len(tokens)}") in added:
            tokens.append(following)
        if word in added and len(tokens) > 1:
            prompt = " ".join(tokens).join(re.split(rf"{re.escape(word)}(?!_\d)", prompt))
    return prompt
