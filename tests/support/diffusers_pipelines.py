"""diffusers' own pipelines with the embedded model, to compare with. They share their models and keep nothing else."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tests.support.reference import MINI, reference_scheduler

PIPELINES = {
    "text": StableDiffusionPipeline,
    "image": StableDiffusionImg2ImgPipeline,
    "inpaint": StableDiffusionInpaintPipeline,
}
PROMPT, NEGATIVE, SEED = "a red star on a blue background", "a green circle", 7


@cache
def _parts() -> dict[str, Any]:
    return StableDiffusionPipeline.from_pretrained(MINI, dtype=torch.float32).components


def pipeline(kind: str, scheduler: Any, unet: Any = None) -> Any:
    """A pipeline of a kind with a scheduler of its own (one by name has the embedded model's configuration), and a UNet in the
    place of the embedded model's if one is given."""
    parts = {**_parts(), "scheduler": reference_scheduler(scheduler, 1) if isinstance(scheduler, str) else scheduler}
    made = PIPELINES[kind](**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    if unet is not None:
        made.unet = unet
    return made


def pipeline_of(folder: Path, kind: str = "text", **replaced: Any) -> Any:
    """A pipeline of the parts in a folder that ``save_source`` wrote, with DDIM; ``replaced`` are parts of another."""
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
        "vae": replaced.get("vae") or AutoencoderKL.from_pretrained(folder, subfolder="vae"),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "scheduler": reference_scheduler("ddim", 1),
    }
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    made = PIPELINES[kind](**{**parts, **replaced}, **absent)
    made.set_progress_bar_config(disable=True)
    return made


def inputs(kind: str, strength: float = 0.6) -> dict[str, Any]:
    """What ``generate`` takes beside the prompt for a kind of pipeline."""
    if kind == "text":
        return {}
    return {"image": picture(), "strength": strength} | ({"mask": mask()} if kind == "inpaint" else {})


def latents(made: Any, images: int = 1, **settings: Any) -> Tensor:
    """Final latents of a pipeline called with what ``generate`` is called with; picture i has the generator of SEED + i."""
    given = {name: value for name, value in settings.items() if name not in {"steps", "mask"}}
    if "mask" in settings:
        given["mask_image"] = settings["mask"]
    result = made(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=settings.get("steps", 6),
        num_images_per_prompt=images,
        generator=[torch.Generator().manual_seed(SEED + i) for i in range(images)],
        output_type="latent",
        **{"guidance_scale": 3.0, **given},
    )
    found: Tensor = result.images
    return found


def picture(height: int = 64, width: int = 64) -> Image.Image:
    """A picture in RGB, of coloured squares."""
    colours = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3))
    return Image.fromarray(np.kron(colours, np.ones((16, 16, 1))).astype(np.uint8))


def mask(height: int = 64, width: int = 64) -> Image.Image:
    """A mask whose white part begins and ends inside of latents."""
    made = Image.new("L", (width, height))
    made.paste(255, (10, 8, 50, 43))
    return made
