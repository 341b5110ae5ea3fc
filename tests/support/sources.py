"""A whole checkpoint in the diffusers folder layout, small enough to be traced in seconds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tests.support.reference import MINI
from tests.support.unets import TEXT_WIDTH, small_unet


def save_source(folder: Path, unet: UNet2DConditionModel | None = None, **vae_changes: Any) -> Path:
    """Write a seeded checkpoint with the embedded model's tokenizer and scheduler; pictures are twice the latents' size."""
    (unet or small_unet("two stages")).save_pretrained(folder / "unet")
    torch.manual_seed(1)
    small: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 16,
        "scaling_factor": 0.5,
    }
    AutoencoderKL(**{**small, **vae_changes}).save_pretrained(folder / "vae")
    text = CLIPTextConfig(
        vocab_size=636, hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, projection_dim=TEXT_WIDTH, bos_token_id=634, eos_token_id=635, pad_token_id=635,
    )  # fmt: skip
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(MINI / part, folder / part)
    return folder
