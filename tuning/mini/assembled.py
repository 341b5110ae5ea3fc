"""Stage `assembled`: the UNet assembled by recipe, distilled from the trained one; text encoder and autoencoder stay."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from tuning.assembly import assemble
from tuning.distill import DistillLoss
from tuning.folder import save_part
from tuning.loop import generator
from tuning.mini.latents import Batch, LatentPools
from tuning.mini.sampling import accuracy
from tuning.recipes import Recipe
from tuning.workers import Workers

__all__ = ["AssembledTask"]


class AssembledTask:
    """Distils `recipe`'s student from `teacher` on the latents that the teacher was trained on."""

    name = "assembled"

    def __init__(
        self,
        teacher: UNet2DConditionModel,
        recipe: Recipe,
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
        self._student = assemble(teacher, recipe)
        for model in (teacher, self._student):
            model.to(workers.device, memory_format=torch.channels_last)
        self.module: nn.Module = self._student
        self._text = text.to(workers.device).requires_grad_(False).eval()
        self._losses = DistillLoss(teacher, self._student, recipe.loss)
        self._tokenizer, self._vae, self._pools, self._folder = tokenizer, vae, pools, folder
        self._validation, self._prompts = validation, prompts

    def _distil(self, drawn: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            states = self._text(drawn.tokens).last_hidden_state
        return self._losses(drawn.noisy, drawn.timesteps, states, drawn.target)

    def loss(self, step: int, progress: float) -> dict[str, Tensor]:
        """Noise, output and feature losses of one batch."""
        return self._distil(self._pools.draw(step))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The losses on held-back scenes at fixed noise, and the accuracy of sampled pictures."""
        latents, tokens = self._pools.encode(self._validation, "diffusion validation", held=True)
        totals: dict[str, float] = {}
        for at in range(0, self._validation, 128):
            part = self._pools.noised(latents[at : at + 128], tokens[at : at + 128], generator(3, at), 0, 128)
            for name, value in self._distil(part).items():
                totals[f"valid_{name}"] = totals.get(f"valid_{name}", 0.0) + float(value) * len(part.noisy) / self._validation
        return totals | accuracy(self._student, self._text, self._tokenizer, self._vae, count=self._prompts)

    def export(self) -> None:
        """Writes unet_assembled/."""
        save_part(self._student, self._folder / "unet_assembled")
