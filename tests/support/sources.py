"""A whole checkpoint in the diffusers folder layout, small enough to be traced in seconds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tests.support.reference import MINI
from tests.support.unets import TEXT_WIDTH, small_unet


def save_source(folder: Path, unet: UNet2DConditionModel | None = None, text_layers: int = 1, **vae_changes: Any) -> Path:
    """Write a seeded checkpoint with the embedded model's tokenizer and scheduler; pictures are twice the latents' size."""
    (unet or small_unet("two stages")).save_pretrained(folder / "unet")
    small_vae(**vae_changes).save_pretrained(folder / "vae")
    text = CLIPTextConfig(
        vocab_size=636, hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=text_layers, num_attention_heads=2,
        max_position_embeddings=32, projection_dim=TEXT_WIDTH, bos_token_id=634, eos_token_id=635, pad_token_id=635,
    )  # fmt: skip
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(MINI / part, folder / part)
    return folder


def small_vae(seed: int = 1, **changes: Any) -> AutoencoderKL:
    """A seeded VAE; pictures are twice the latents' size."""
    torch.manual_seed(seed)
    stages = len(changes.get("block_out_channels", (8, 8)))
    small: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * stages,
        "up_block_types": ("UpDecoderBlock2D",) * stages,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 16,
        "scaling_factor": 0.5,
    }
    return AutoencoderKL(**{**small, **changes}).eval()


def tiny_vae() -> AutoencoderTiny:
    """A seeded AutoencoderTiny (TAESD) with as many latents."""
    torch.manual_seed(2)
    widths, blocks = (8, 8), (1, 1)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, num_encoder_blocks=blocks, num_decoder_blocks=blocks
    )
    return tiny.eval()
