"""Stage `diffusion`: the UNet and the text encoder, trained jointly on the frozen autoencoder's latents."""

from pathlib import Path

import torch
from torch import Tensor, nn

from tuning.checkpoints.folder import save_part
from tuning.mini.latents import LatentPools
from tuning.mini.reader_score import accuracy
from tuning.training.distributed import Workers
from tuning.training.noising import Batch, Noising
from tuning.training.teacher import Teacher

__all__ = ["DiffusionTask"]


class DiffusionTask:
    """Velocity prediction (Salimans and Ho, arXiv 2202.00512): the squared error, every timestep with the same weight."""

    name = "diffusion"

    def __init__(
        self, model: Teacher, pools: LatentPools, noising: Noising, folder: Path, workers: Workers, *, prompts: int = 64
    ) -> None:
        model.unet.to(workers.device, memory_format=torch.channels_last)
        model.text.to(workers.device)
        self.module: nn.Module = nn.ModuleDict({"unet": model.unet, "text": model.text})
        self._model, self._pools, self._noising, self._folder, self._prompts = model, pools, noising, folder, prompts

    def _loss(self, drawn: Batch) -> Tensor:
        states = self._model.text(drawn.tokens).last_hidden_state
        velocity = self._model.unet(drawn.noisy, drawn.timesteps, states).sample
        return nn.functional.mse_loss(velocity, drawn.target)

    def loss(self, step: int, progress: float) -> dict[str, Tensor]:
        """The mean squared error of the velocity."""
        return {"loss": self._loss(self._noising.batch(*self._pools.draw(step), step))}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss on held-back scenes at fixed noise, and the accuracy of sampled pictures."""
        latents, tokens = self._pools.validation()
        total = 0.0
        for at in range(0, len(latents), 128):
            part = self._noising.fixed(latents[at : at + 128], tokens[at : at + 128], at)
            total += float(self._loss(part)) * len(part.noisy) / len(latents)
        return {"valid_loss": total} | accuracy(self._model.unet, self._model, count=self._prompts)

    def export(self) -> None:
        """Writes unet/ and text_encoder/."""
        save_part(self._model.unet, self._folder / "unet")
        save_part(self._model.text, self._folder / "text_encoder")
