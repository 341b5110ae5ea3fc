"""What pictures of held-back prompts show, as figures for the training log."""

import torch
from diffusers import UNet2DConditionModel

from tuning.mini.reading import read_captions
from tuning.mini.scenes import held_back_prompts
from tuning.training.sampling import sample
from tuning.training.teacher import Teacher

__all__ = ["GUIDANCE", "accuracy"]

GUIDANCE = 3.0  # what the embedded model's pictures look best with


def accuracy(unet: UNet2DConditionModel, model: Teacher, *, count: int = 64, seed: int = 1, steps: int = 20) -> dict[str, float]:
    """The share of held-back prompts right in each attribute by the rule reader.

    `seed` 1 is the list for validation: the published figures use the list of seed 0.
    """
    prompts = held_back_prompts(count, seed)
    parts = [sample(unet, model, prompts[at : at + 64], guidance=GUIDANCE, steps=steps, seed=at) for at in range(0, count, 64)]
    return {f"right_{name}": share for name, share in read_captions(prompts, torch.cat(parts)).items()}
