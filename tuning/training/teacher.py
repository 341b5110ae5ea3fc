"""The model that is taught from: UNet, text encoder, tokenizer, autoencoder and noise schedule of one checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tuning.checkpoints.configs import latent_size
from tuning.checkpoints.part_loaders import is_tiny
from tuning.checkpoints.source import reading
from tuning.loras.changed_source import find_changed_source
from tuning.loras.lora import Lora
from tuning.training.noising import tokenize

__all__ = ["Teacher"]


@dataclass
class Teacher:
    """All parts of a checkpoint, float32, frozen, in evaluation mode."""

    name: str
    unet: UNet2DConditionModel
    text: CLIPTextModel
    tokenizer: CLIPTokenizer
    vae: AutoencoderKL | AutoencoderTiny
    schedule: DDPMScheduler

    @classmethod
    def load(cls, source: str, variant: str | None = None, loras: Sequence[Lora] = (), vae: str | None = None) -> "Teacher":
        """Reads any source of a whole checkpoint; `variant` of its weight files, such as fp16, where there are several.

        LoRAs are fused into UNet and text encoder, and `vae` names what replaces the checkpoint's own.

        Raises TuningError when a part is missing, damaged or a pickle, or when the parts don't fit together.
        """
        found = find_changed_source(source, variant, loras, vae)
        models = found.models()
        unet, text, vae = (models[part].requires_grad_(False) for part in ("unet", "text_encoder", "vae"))
        tokenizer = found.tokenizer(text.config)
        config = found.scheduler_config()
        with reading(source, found.folder / "scheduler"):
            schedule = DDPMScheduler.from_config(config)
        return cls(source, unet, text, tokenizer, vae, schedule)

    @property
    def size(self) -> int:
        """The shorter side of the pictures that the UNet was made for, in pixels."""
        return min(latent_size(self.unet.config)) * self.scale

    @property
    def scale(self) -> int:
        """Pixels per latent, along a side."""
        return 1 << (len(self.vae.config.block_out_channels) - 1)

    def ids(self, captions: Sequence[str]) -> Tensor:
        """Captions -> (n, length) token ids."""
        return tokenize(self.tokenizer, list(captions))

    @torch.no_grad()
    def states(self, tokens: Tensor) -> Tensor:
        """Token ids (n, length) -> text features (n, length, width)."""
        states: Tensor = self.text(tokens).last_hidden_state
        return states

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (n, 3, h, w) in [-1, 1] -> scaled latents (n, c, h / scale, w / scale): the mode, so always the same."""
        encoded = self.vae.encode(pictures)
        latents: Tensor = encoded.latents if is_tiny(self.vae) else encoded.latent_dist.mode()
        scaled: Tensor = latents * self.vae.config.scaling_factor
        return scaled

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pictures (n, 3, h, w) in [-1, 1]."""
        pictures: Tensor = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return pictures.clamp(-1, 1)
