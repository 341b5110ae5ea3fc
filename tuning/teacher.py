"""The model that is taught from: UNet, text encoder, tokenizer, autoencoder and noise schedule of one checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tuning.errors import TuningError
from tuning.folder import load_unet
from tuning.noising import tokenize
from tuning.sources import check_part, find_folder

__all__ = ["Teacher"]


@dataclass
class Teacher:
    """All parts of a checkpoint, float32, frozen, in evaluation mode."""

    name: str
    unet: UNet2DConditionModel
    text: CLIPTextModel
    tokenizer: CLIPTokenizer
    vae: AutoencoderKL
    schedule: DDPMScheduler

    @classmethod
    def load(cls, source: str) -> "Teacher":
        """Reads `mini`, a diffusers folder or a hub id. Raises TuningError when a part is missing, damaged or a pickle."""
        folder = find_folder(source)
        for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            check_part(source, folder, part, weights=part not in ("tokenizer", "scheduler"))
        safe: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
        vae = _read(folder / "vae", lambda path: AutoencoderKL.from_pretrained(path, **safe))
        text = _read(folder / "text_encoder", lambda path: CLIPTextModel.from_pretrained(path, dtype=torch.float32, **safe))
        tokenizer = _read(folder / "tokenizer", lambda path: CLIPTokenizer.from_pretrained(path, local_files_only=True))
        schedule = _read(folder / "scheduler", lambda path: DDPMScheduler.from_pretrained(path, local_files_only=True))
        models = [model.float().eval().requires_grad_(False) for model in (load_unet(folder / "unet"), text, vae)]
        return cls(source, models[0], models[1], tokenizer, models[2], schedule)

    @property
    def size(self) -> int:
        """Side of the pictures that the UNet was made for, in pixels."""
        return int(self.unet.config.sample_size) * self.scale

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
        latents: Tensor = self.vae.encode(pictures).latent_dist.mode() * self.vae.config.scaling_factor
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pictures (n, 3, h, w) in [-1, 1]."""
        pictures: Tensor = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return pictures.clamp(-1, 1)


def _read(folder: Path, load: Callable[[Path], Any]) -> Any:
    """Turns what diffusers and transformers raise for missing and damaged files, of many kinds, into TuningError."""
    try:
        return load(folder)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TuningError(
            f"teacher: {folder} cannot be read ({reason}); get its files again, as safetensors, not as pickles"
        ) from error
