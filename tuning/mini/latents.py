"""Training batches of latents: pools rendered and encoded ahead of time, renewed after a few passes."""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor
from transformers import CLIPTokenizer

from tuning.loop import generator
from tuning.mini.data import batch
from tuning.workers import Workers

__all__ = ["Batch", "LatentPools", "tokenize"]

_CHUNK = 256


@dataclass(frozen=True)
class Batch:
    """Noisy latents (n, 4, h, w), timesteps (n,), token ids (n, length), and the velocity to predict, like the latents."""

    noisy: Tensor
    timesteps: Tensor
    tokens: Tensor
    target: Tensor


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Captions -> (n, model_max_length) ids, padded and cut."""
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert isinstance(ids, Tensor)
    return ids


class LatentPools:
    """Pools of `size` encoded scenes per process; each serves `epochs` passes, then the next is rendered.

    Every batch follows from (seed, step, rank), so a resumed run repeats an unbroken one. Timesteps are stratified over
    the batch of all processes (one from each equal part of the range); captions are dropped with `dropout` so that
    guidance has an unconditional side.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        noise: DDIMScheduler,
        workers: Workers,
        *,
        size: int,
        epochs: int,
        batch_size: int,
        dropout: float,
        seed: int,
        name: str = "diffusion",
    ) -> None:
        self._vae, self._tokenizer, self._noise, self._workers = vae, tokenizer, noise, workers
        self._size, self._per_pool = size, max(1, epochs * size // batch_size)
        self._batch, self._dropout, self._seed, self._name = batch_size, dropout, seed, name
        self._empty = tokenize(tokenizer, [""])[0]
        self._pool: tuple[int, Tensor, Tensor] | None = None
        vae.requires_grad_(False).to(workers.device, memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(self, count: int, key: str, *, held: bool = False) -> tuple[Tensor, Tensor]:
        """(count, 4, 8, 8) scaled latents and (count, length) ids of new scenes."""
        latents, tokens = [], []
        for at in range(0, count, _CHUNK):
            _, captions, pictures = batch(min(_CHUNK, count - at), f"{key} {at}", held=held)
            pictures = pictures.to(self._workers.device, memory_format=torch.channels_last)
            latents.append(self._vae.encode(pictures).latent_dist.mode().cpu() * self._vae.config.scaling_factor)
            tokens.append(tokenize(self._tokenizer, captions))
        return torch.cat(latents), torch.cat(tokens)

    def _current(self, number: int) -> tuple[Tensor, Tensor]:
        if self._pool is None or self._pool[0] != number:
            latents, tokens = self.encode(self._size, f"{self._name} {self._seed} {number} {self._workers.rank}")
            self._pool = (number, latents, tokens)
        return self._pool[1], self._pool[2]

    def noised(self, latents: Tensor, tokens: Tensor, source: torch.Generator, shift: float, parts: int) -> Batch:
        """Adds noise at stratified timesteps: sample i takes part `shift` + i of `parts` equal ones."""
        n = len(latents)
        strata = (torch.arange(n) + shift + torch.rand(n, generator=source)) / parts
        timesteps = (strata * self._noise.config.num_train_timesteps).long()
        noise = torch.randn(latents.shape, generator=source)
        noisy = self._noise.add_noise(latents, noise, timesteps)
        target = self._noise.get_velocity(latents, noise, timesteps)
        device = self._workers.device
        last = torch.channels_last
        return Batch(noisy.to(device, memory_format=last), timesteps.to(device), tokens.to(device), target.to(device))

    def draw(self, step: int) -> Batch:
        """The batch of this process at `step`."""
        latents, tokens = self._current(step // self._per_pool)
        source = generator(self._seed, step, self._workers.rank)
        chosen = torch.randint(0, self._size, (self._batch,), generator=source)
        tokens = tokens[chosen].clone()
        tokens[torch.rand(self._batch, generator=source) < self._dropout] = self._empty
        n = self._batch
        return self.noised(latents[chosen], tokens, source, self._workers.rank * n, self._workers.count * n)
