"""The rendered scenes as training data: pools rendered and encoded ahead of time, renewed after a few passes."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from tuning.mini.data import batch
from tuning.training.distributed import Workers
from tuning.training.noising import generator, tokenize

__all__ = ["LatentPools"]

_CHUNK = 256


class LatentPools:
    """Pools of `size` encoded scenes per process; each serves `epochs` passes, then the next is rendered.

    What is drawn follows from (seed, step, rank), so a resumed run repeats an unbroken one.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        workers: Workers,
        *,
        size: int,
        epochs: int,
        batch_size: int,
        seed: int,
        name: str = "diffusion",
        validation: int = 512,
    ) -> None:
        self._vae, self._tokenizer, self._workers = vae, tokenizer, workers
        self._size, self._per_pool = size, max(1, epochs * size // batch_size)
        self._batch, self._seed, self._name, self._validation = batch_size, seed, name, validation
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

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Latents and ids of this process at `step`."""
        latents, tokens = self._current(step // self._per_pool)
        chosen = torch.randint(0, self._size, (self._batch,), generator=generator(self._seed, step, self._workers.rank))
        return latents[chosen], tokens[chosen]

    def validation(self) -> tuple[Tensor, Tensor]:
        """Latents and ids of scenes that training never sees."""
        return self.encode(self._validation, "diffusion validation", held=True)
