"""The model folder: fp16 safetensors in the diffusers layout, written so that a reader never sees half a file."""

import json
from pathlib import Path

from tuning.checkpoints.folder import save_part
from tuning.mini.models import load_tokenizer, new_text_encoder, new_unet, new_vae, scheduler, train_tokenizer

__all__ = ["INDEX", "save_random", "save_shell"]

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def save_shell(folder: Path) -> None:
    """Writes what has no weights: the pipeline's index, the tokenizer and the scheduler's configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    scheduler().save_pretrained(folder / "scheduler")
    train_tokenizer(folder / "tokenizer")


def save_random(folder: Path) -> None:
    """Writes the whole folder with random weights, for tests of what only needs its shapes."""
    save_shell(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    save_part(new_unet(), folder / "unet")
    save_part(new_vae(), folder / "vae")
    save_part(new_text_encoder(tokenizer), folder / "text_encoder")
