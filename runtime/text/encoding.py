"""Prompts as the text encoder's features."""

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engines import DTYPES, Manifest
from engines.bundle.names import TEXT
from engines.support.textual_inversion import expand_words
from runtime.request import Request

__all__ = ["Prompts"]


class Prompts:
    """Encodes prompts, in one thread at a time.

    Args:
        manifest: of the bundle.
        tokenizer: of it, as transformers has it.
        encode: the text encoder: from tokens (prompts, length) to features (prompts, length, width), on its device.
        device: where features are to be.
    """

    def __init__(self, manifest: Manifest, tokenizer: Any, encode: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._manifest, self.tokenizer, self._encode, self._device = manifest, tokenizer, encode, device
        self._lock = threading.Lock()

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
        """Features (prompts, tokens, width), and of each prompt that was too long the words that were not read."""
        length = self._manifest.text_length
        with self._lock:  # padding and truncation are state of the tokenizer: two threads would change each other's
            words = [expand_words(prompt, self.tokenizer) for prompt in prompts]
            whole = [self.tokenizer(prompt, verbose=False).input_ids for prompt in words]
            ids = self.tokenizer(words, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
            cut = [numbers for numbers in whole if len(numbers) > length]
            unread = tuple(self.tokenizer.decode(numbers[length - 1 : -1]).strip() for numbers in cut)
        for numbers, words_left in zip(cut, unread, strict=True):
            warnings.warn(f"prompt cut to {length} tokens, it has {len(numbers)}; not read: {words_left!r:.200}", stacklevel=4)
        return self._encode(ids.to(self._device)), unread

    def features(self, request: Request, guided: bool) -> tuple[Tensor, tuple[str, ...]]:
        """Features of a UNet call, and what was not read: with guidance, the negative prompts' rows and then the prompts'."""
        text, unread = self._given_or_encoded(request.prompt_embeds, request.prompts)
        text = text.repeat_interleave(request.num_images, dim=0)
        if not guided:
            return text, unread
        negative, more = self._given_or_encoded(request.negative_prompt_embeds, request.negative_prompts)
        repeats = len(text) // len(negative)
        return torch.cat([negative.repeat_interleave(repeats, dim=0), text]), unread + more

    def _given_or_encoded(self, embeds: Tensor | None, prompts: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
        if embeds is None:
            return self.encode(prompts)
        return embeds.to(self._device, DTYPES[self._manifest.features[TEXT].dtype]), ()
