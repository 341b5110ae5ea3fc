"""Prompts as the text encoder's features."""

import re
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engines import DTYPES, Manifest
from engines.bundle.names import TEXT
from engines.support.spelling import did_you_mean
from engines.support.textual_inversion import expand_words
from runtime.request import Request

__all__ = ["Prompts"]

Encoder = Callable[[Tensor], Tensor]
"""A text encoder: from tokens (prompts, length) to features (prompts, length, width), on its device."""
_SMALL = 5000
"""Tokens of a vocabulary made for a model of few words; CLIP's has ten times as many."""


class Prompts:
    """Encodes prompts, in one thread at a time.

    Args:
        manifest: of the bundle.
        tokenizer: of it, as transformers has it.
        device: where features are to be.
    """

    def __init__(self, manifest: Manifest, tokenizer: Any, device: torch.device) -> None:
        self._manifest, self.tokenizer, self._device = manifest, tokenizer, device
        self._lock, self._unknown = threading.Lock(), set[str]()

    def encode(self, prompts: Sequence[str], encoder: Encoder) -> tuple[Tensor, tuple[str, ...]]:
        """Features (prompts, tokens, width), and of each prompt that was too long the words that were not read."""
        length = self._manifest.text_length
        with self._lock:  # padding and truncation are state of the tokenizer: two threads would change each other's
            words = [expand_words(prompt, self.tokenizer) for prompt in prompts]
            whole = [self.tokenizer(prompt, verbose=False).input_ids for prompt in words]
            ids = self.tokenizer(words, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
            self._warn_of_unknown(prompts)
            cut = [numbers for numbers in whole if len(numbers) > length]
            unread = tuple(self.tokenizer.decode(numbers[length - 1 : -1]).strip() for numbers in cut)
        for numbers, words_left in zip(cut, unread, strict=True):
            warnings.warn(f"prompt cut to {length} tokens, it has {len(numbers)}; not read: {words_left!r:.200}", stacklevel=4)
        return encoder(ids.to(self._device)), unread

    def _warn_of_unknown(self, prompts: Sequence[str]) -> None:
        """Warn once of each word that is no token of a small vocabulary: in a large one, words are made of several tokens."""
        vocabulary = self.tokenizer.get_vocab()
        if len(vocabulary) > _SMALL:
            return
        # Words of textual inversion are known, whatever they are called.
        added = [re.escape(word) for word in sorted(self.tokenizer.added_tokens_encoder, key=len, reverse=True)]
        prompts = [re.sub("|".join(added), " ", prompt) for prompt in prompts] if added else prompts
        words = dict.fromkeys(word for prompt in prompts for word in re.findall(r"[^\W\d_]{2,}", prompt.lower()))
        new = [word for word in words if f"{word}</w>" not in vocabulary and word not in self._unknown]
        if not new:
            return
        self._unknown.update(new)
        known = [token.removesuffix("</w>") for token in vocabulary if token.endswith("</w>") and len(token) > len("x</w>")]
        meant = " ".join(near for word in new[:10] if (near := did_you_mean(word, known).strip()))
        warnings.warn(
            f"this model never learned the word{'s' * (len(new) > 1)} {', '.join(map(repr, new[:10]))}, and what it makes of "
            f"{'them' if len(new) > 1 else 'it'} means nothing (docs/embedded-model.md has those that it knows)"
            + (f"; {meant}" if meant else ""),
            stacklevel=5,
        )

    def features(self, request: Request, guided: bool, encoder: Encoder) -> tuple[Tensor, tuple[str, ...]]:
        """Features of a UNet call, and what was not read: with guidance, the negative prompts' rows and then the prompts'."""
        text, unread = self._given_or_encoded(request.prompt_embeds, request.prompts, encoder)
        text = text.repeat_interleave(request.num_images, dim=0)
        if not guided:
            return text, unread
        negative, more = self._given_or_encoded(request.negative_prompt_embeds, request.negative_prompts, encoder)
        repeats = len(text) // len(negative)
        return torch.cat([negative.repeat_interleave(repeats, dim=0), text]), unread + more

    def _given_or_encoded(
        self, embeds: Tensor | None, prompts: Sequence[str], encoder: Encoder
    ) -> tuple[Tensor, tuple[str, ...]]:
        if embeds is None:
            return self.encode(prompts, encoder)
        return embeds.to(self._device, DTYPES[self._manifest.features[TEXT].dtype]), ()
