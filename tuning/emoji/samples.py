"""Grids of sample pictures that the emoji training leaves to look at: seen pairs, and pairs held back."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tuning.emoji.concepts import Pair
from tuning.emoji.pictures import Textures
from tuning.mini.models import scheduler
from tuning.mini.reader_score import GUIDANCE
from tuning.training.curves import write_grid
from tuning.training.sampling import sample
from tuning.training.teacher import Teacher

__all__ = ["draw_pairs", "sample_grids"]

_COLUMNS, _PICTURES, _AT_A_TIME = 12, 48, 32


def draw_pairs(model: Teacher, pairs: Sequence[Pair], *, steps: int = 20, guidance: float = GUIDANCE, seed: int = 0) -> Tensor:
    """Pictures (n, 3, h, w) in [-1, 1] of pairs; a batch's noise follows from its position, so the order of pairs counts."""
    prompts = [pair.prompt for pair in pairs]
    parts = [
        sample(model.unet, model, prompts[at : at + _AT_A_TIME], steps=steps, guidance=guidance, seed=seed + at)
        for at in range(0, len(prompts), _AT_A_TIME)
    ]
    return torch.cat(parts)


def sample_grids(
    unet: UNet2DConditionModel,
    text: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    data: Textures,
    folder: Path,
    name: str,
) -> list[str]:
    """Draws `seen-NAME.png` and `held-NAME.png`; returns the first prompts of both."""
    model = Teacher("emoji", unet, text, tokenizer, vae, DDPMScheduler.from_config(scheduler().config))
    seen = data.train[:: max(1, len(data.train) // _PICTURES)][:_PICTURES]
    first = []
    for kind, icons in (("seen", seen), ("held", data.held[:_PICTURES])):
        if icons:
            write_grid(draw_pairs(model, icons).cpu(), folder / f"{kind}-{name}.png", _COLUMNS)
            first += [icon.prompt for icon in icons[:4]]
    return first
