"""Training batches: noise added to latents at stratified timesteps, and what the UNet has to predict then."""

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from torch import Tensor
from transformers import CLIPTokenizer

from engines.support.textual_inversion import expand_words
from tuning.errors import TuningError
from tuning.training.distributed import Workers

__all__ = ["Batch", "Noising", "generator", "tokenize"]

_PREDICTIONS = ("epsilon", "v_prediction")


def generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """A generator for one step of one worker."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 64 + rank)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Captions -> (n, model_max_length) ids, padded and cut; words of a textual inversion are expanded as for pictures."""
    words = [expand_words(caption, tokenizer) for caption in captions]
    ids = tokenizer(words, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert isinstance(ids, Tensor)
    return ids


@dataclass(frozen=True)
class Batch:
    """Noisy latents (n, c, h, w), timesteps (n,), token ids (n, length), and the target to predict, like the latents."""

    noisy: Tensor
    timesteps: Tensor
    tokens: Tensor
    target: Tensor


class Noising:
    """Makes batches from latents with a model's own noise schedule, for epsilon and for velocity prediction.

    Every number follows from (seed, step) and the place in the batch of all processes, so that two processes do what one
    does with a batch twice as large. Timesteps are stratified: one from each equal part of the range. Captions are
    dropped with `dropout`, so that guidance has an unconditional side.
    """

    def __init__(self, schedule: DDPMScheduler, workers: Workers, *, empty: Tensor, dropout: float = 0.1, seed: int = 0) -> None:
        """`empty` (length,) are the ids of no caption. Raises TuningError for a prediction that is neither of the two."""
        self._kind: str = schedule.config.prediction_type
        if self._kind not in _PREDICTIONS:
            raise TuningError(f"the teacher predicts {self._kind!r}; distillation knows {' and '.join(_PREDICTIONS)}")
        self._schedule, self._workers = schedule, workers
        self._empty, self._dropout, self._seed = empty, dropout, seed

    def batch(self, latents: Tensor, tokens: Tensor, step: int) -> Batch:
        """The training batch of this process at `step` from its latents (n, c, h, w) and ids (n, length)."""
        n, total = len(latents), len(latents) * self._workers.count
        mine = slice(self._workers.rank * n, (self._workers.rank + 1) * n)
        source = generator(self._seed, step)
        strata = ((torch.arange(total) + torch.rand(total, generator=source)) / total)[mine]
        dropped = (torch.rand(total, generator=source) < self._dropout)[mine]
        noise = torch.randn((total, *latents.shape[1:]), generator=source)[mine]
        return self._noised(latents, torch.where(dropped[:, None], self._empty, tokens), strata, noise)

    def fixed(self, latents: Tensor, tokens: Tensor, key: int) -> Batch:
        """A batch for validation: the same noise at every call with this `key`, all captions."""
        source = generator(3, key)
        strata = (torch.arange(len(latents)) + torch.rand(len(latents), generator=source)) / len(latents)
        return self._noised(latents, tokens, strata, torch.randn(latents.shape, generator=source))

    def _noised(self, latents: Tensor, tokens: Tensor, strata: Tensor, noise: Tensor) -> Batch:
        timesteps = (strata * self._schedule.config.num_train_timesteps).long()
        noisy = self._schedule.add_noise(latents, noise, timesteps)
        target = noise if self._kind == "epsilon" else self._schedule.get_velocity(latents, noise, timesteps)
        device, last = self._workers.device, torch.channels_last
        return Batch(
            noisy.to(device, memory_format=last), timesteps.to(device), tokens.to(device), target.to(device, memory_format=last)
        )
