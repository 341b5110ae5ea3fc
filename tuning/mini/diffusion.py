"""Stage `diffusion`: the UNet and the text encoder, trained jointly on the frozen autoencoder's latents."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from tuning.folder import save_part
from tuning.loop import generator
from tuning.mini.latents import LatentPools
from tuning.mini.sampling import accuracy
from tuning.workers import Workers

__all__ = ["DiffusionTask"]


class DiffusionTask:
    """Velocity prediction (Salimans and Ho, arXiv 2202.00512): the squared error, every timestep with the same weight."""

    name = "diffusion"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        vae: AutoencoderKL,
        pools: LatentPools,
        folder: Path,
        workers: Workers,
        *,
        validation: int = 512,
        prompts: int = 64,
    ) -> None:
        unet.to(workers.device, memory_format=torch.channels_last)
        text.to(workers.device)
        self.module: nn.Module = nn.ModuleDict({"unet": unet, "text": text})
        self._unet, self._text, self._tokenizer, self._vae = unet, text, tokenizer, vae
        self._pools, self._folder = pools, folder
        self._validation, self._prompts = validation, prompts

    def _predict(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        velocity = self._unet(noisy, timesteps, self._text(tokens).last_hidden_state).sample
        assert isinstance(velocity, Tensor)
        return velocity

    def loss(self, step: int, progress: float) -> dict[str, Tensor]:
        """The mean squared error of the velocity."""
        drawn = self._pools.draw(step)
        predicted = self._predict(drawn.noisy, drawn.timesteps, drawn.tokens)
        return {"loss": nn.functional.mse_loss(predicted, drawn.target)}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss on held-back scenes at fixed noise, and the accuracy of sampled pictures."""
        latents, tokens = self._pools.encode(self._validation, "diffusion validation", held=True)
        total = 0.0
        for at in range(0, self._validation, 128):
            source = generator(3, at)
            part = self._pools.noised(latents[at : at + 128], tokens[at : at + 128], source, 0, 128)
            predicted = self._predict(part.noisy, part.timesteps, part.tokens)
            total += float(nn.functional.mse_loss(predicted, part.target)) * len(part.noisy) / self._validation
        return {"valid_loss": total} | self._accuracy()

    def _accuracy(self) -> dict[str, float]:
        return accuracy(self._unet, self._text, self._tokenizer, self._vae, count=self._prompts)

    def export(self) -> None:
        """Writes unet/ and text_encoder/."""
        save_part(self._unet, self._folder / "unet")
        save_part(self._text, self._folder / "text_encoder")
