"""Prompts as the text encoder's features."""

import re
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engines import DTYPES, Engine, Manifest
from engines.bundle.names import TEXT
from engines.support.spelling import did_you_mean
from engines.support.textual_inversion import expand_words
from engines.support.tokenizers import learned_words
from runtime.errors import RequestError
from runtime.request import Request
from runtime.text.chunks import chunk_rows, chunks_needed, takes_chunks

__all__ = ["Prompts"]

Encoder = Callable[[Tensor], Tensor]
"""A text encoder: from tokens (prompts, length) to features (prompts, length, width), on its device."""
_MOST_UNKNOWN = 10_000
"""Words that were warned of and are remembered."""


class Prompts:
    """Encodes prompts, in one thread at a time.

    Args:
        manifest: of the bundle.
        tokenizer: of it, as transformers has it.
        engine: on whose device features are to be.
    """

    def __init__(self, manifest: Manifest, tokenizer: Any, engine: Engine) -> None:
        self._manifest, self.tokenizer, self._engine = manifest, tokenizer, engine
        self._lock, self._unknown = threading.Lock(), set[str]()
        self._words = learned_words(tokenizer)

    def encode(self, prompts: Sequence[str], encoder: Encoder, chunks: int = 1) -> tuple[Tensor, tuple[str, ...]]:
        """Features (prompts, tokens, width), and of each prompt that was too long the words that were not read.

        Args:
            prompts: the texts.
            encoder: which is given a chunk of all prompts at a time.
            chunks: how many each prompt gets, of ``text_length`` tokens.
        """
        length, padding = self._manifest.text_length, (self.tokenizer.pad_token_id, self.tokenizer.padding_side)
        ids = self._ids(prompts)
        rows = torch.tensor([chunk_rows(numbers, length, chunks, *padding) for numbers in ids], device=self._engine.device)
        self._warn_of_unknown(prompts)
        cut = [numbers for numbers in ids if chunks_needed(numbers, length) > chunks]
        unread = tuple(self.tokenizer.decode(numbers[1 + chunks * (length - 2) : -1]).strip() for numbers in cut)
        for numbers, words_left in zip(cut, unread, strict=True):
            read = f"{length} tokens" if chunks == 1 else f"{chunks} chunks of {length} tokens"
            more = self._advice(chunks, chunks_needed(numbers, length))
            warnings.warn(f"prompt cut to {read}, it has {len(numbers)}{more}; not read: {words_left!r:.200}", stacklevel=5)
        return torch.cat([encoder(rows[:, number].contiguous()) for number in range(chunks)], dim=1), unread

    def _ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """The tokens of each prompt, with a mark at both ends, however many there are."""
        with self._lock:  # a tokenizer has state: two threads would change each other's
            return [self.tokenizer(expand_words(prompt, self.tokenizer), verbose=False).input_ids for prompt in prompts]

    def _advice(self, chunks: int, needed: int) -> str:
        """Advice to build for more chunks, where only the engines' profile keeps a prompt from being read whole; else empty."""
        by_profile = self._engine.has_profile and takes_chunks(self._manifest) and chunks == self._manifest.text_chunks
        return f" (engines built with --text-chunks {needed} read all)" if by_profile else ""

    def chunks(self, prompts: Sequence[str]) -> int:
        """How many chunks the longest of the prompts needs."""
        return max(chunks_needed(numbers, self._manifest.text_length) for numbers in self._ids(prompts))

    def _warn_of_unknown(self, prompts: Sequence[str]) -> None:
        """Warn once of each word that a model of few words was not trained with."""
        if not self._words:
            return
        # Words of textual inversion are known, whatever they are called.
        added = [re.escape(word) for word in sorted(self.tokenizer.added_tokens_encoder, key=len, reverse=True)]
        prompts = [re.sub("|".join(added), " ", prompt) for prompt in prompts] if added else prompts
        words = dict.fromkeys(word for prompt in prompts for word in re.findall(r"[^\W\d_]{2,}", prompt.lower()))
        new = [word for word in words if word not in self._words and word not in self._unknown]
        if not new:
            return
        if len(self._unknown) > _MOST_UNKNOWN:  # a service reads words of strangers
            self._unknown.clear()
        self._unknown.update(new)
        meant = " ".join(near for word in new[:10] if (near := did_you_mean(word, sorted(self._words)).strip()))
        warnings.warn(
            f"this model never learned the word{'s' * (len(new) > 1)} {', '.join(map(repr, new[:10]))}, and what it makes of "
            f"{'them' if len(new) > 1 else 'it'} means nothing (docs/embedded-model.md has those that it knows)"
            + (f"; {meant}" if meant else ""),
            stacklevel=6,
        )

    def tokens(self, request: Request, guided: bool, most: int | None) -> int:
        """Tokens of the text features of a UNet call: as many as its longest prompt needs, in whole chunks, or as were given.

        Args:
            request: whose prompts, or features.
            guided: whether the negative prompts count.
            most: tokens that the UNet takes; None for any number.

        Raises:
            RequestError: features were given whose length chunks cannot make up for.
        """
        length = self._manifest.text_length
        sides = {"prompt_embeds": request.prompt_embeds, "negative_prompt_embeds": request.negative_prompt_embeds}
        texts = {"prompt_embeds": request.prompts, "negative_prompt_embeds": request.negative_prompts}
        found = {}
        for name in sides if guided else ["prompt_embeds"]:
            given = sides[name]
            wanted = length * self.chunks(texts[name]) if given is None else given.shape[1]
            most_read = length if request.long_prompts == "cut" else most
            found[name] = wanted if given is not None or most_read is None else min(wanted, most_read)
        tokens = max(found.values())
        if short := [name for name in found if (tokens - found[name]) % length]:
            name, count = short[0], found[short[0]]
            has = f"is not given, and made of text it has {count} tokens" if sides[name] is None else f"has {count} tokens"
            raise RequestError(f"{name} {has}, the other features have {tokens}; give {name} of {tokens} tokens")
        return tokens

    def features(self, request: Request, guided: bool, tokens: int, encoder: Encoder) -> tuple[Tensor, tuple[str, ...]]:
        """Features of a UNet call, and what was not read: with guidance, the negative prompts' rows and then the prompts'.

        What has fewer than so many ``tokens`` is followed by empty chunks.
        """
        text, unread = self._given_or_encoded(request.prompt_embeds, request.prompts, tokens, encoder)
        text = text.repeat_interleave(request.num_images, dim=0)
        if not guided:
            return text, unread
        negative, more = self._given_or_encoded(request.negative_prompt_embeds, request.negative_prompts, tokens, encoder)
        repeats = len(text) // len(negative)
        return torch.cat([negative.repeat_interleave(repeats, dim=0), text]), unread + more

    def _given_or_encoded(
        self, embeds: Tensor | None, prompts: Sequence[str], tokens: int, encoder: Encoder
    ) -> tuple[Tensor, tuple[str, ...]]:
        if embeds is None:
            return self.encode(prompts, encoder, tokens // self._manifest.text_length)
        given = embeds.to(self._engine.device, DTYPES[self._manifest.features[TEXT].dtype])
        if missing := (tokens - given.shape[1]) // self._manifest.text_length:
            empty, _ = self.encode([""], encoder, missing)
            given = torch.cat([given, empty.expand(len(given), -1, -1)], dim=1)
        return given, ()
