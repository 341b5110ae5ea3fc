"""Tiny models and settings, so that whole training runs take seconds."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from tuning.checkpoints.folder import save_part
from tuning.mini.data import batch, to_bytes
from tuning.mini.models import load_tokenizer, new_text_encoder, new_unet, new_vae, save_shell
from tuning.mini.settings import STAGES, MiniSettings
from tuning.training.loop import LoopSettings


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Models this small gain nothing from threads, and lose much when other programs run."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights."""
    folder = tmp_path_factory.mktemp("mini")
    save_shell(folder)
    return folder


@pytest.fixture(scope="session")
def small_unet() -> UNet2DConditionModel:
    """SD 1.5's shape at widths of 16 to 24."""
    torch.manual_seed(0)
    return new_unet((16, 16, 24, 24), 32).eval()


@pytest.fixture(scope="session")
def small_model(shell: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder with random weights at the smallest widths. Not to be changed."""
    folder = tmp_path_factory.mktemp("small") / "model"
    shutil.copytree(shell, folder)
    torch.manual_seed(0)
    save_part(new_unet((8, 8, 16, 16), 16), folder / "unet")
    save_part(new_vae((8, 8, 8, 8)), folder / "vae")
    save_part(new_text_encoder(load_tokenizer(folder / "tokenizer"), 16, 1), folder / "text_encoder")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 rendered scenes with captions. Not to be changed."""
    folder = tmp_path_factory.mktemp("pictures")
    _, captions, rendered = batch(24, "pictures")
    lines = []
    for i, (text, pixels) in enumerate(zip(captions, to_bytes(rendered), strict=True)):
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
        lines.append(json.dumps({"file_name": f"{i:02}.png", "text": text}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def tiny() -> MiniSettings:
    """A few steps of everything at the smallest widths."""
    loop = LoopSettings(steps=4, warmup=2, log_every=1, validate_minutes=60)
    return dataclasses.replace(
        MiniSettings(),
        stages=dict.fromkeys(STAGES, loop),
        vae_batch=2,
        batch=4,
        pool=8,
        validation=4,
        prompts=2,
        vae_widths=(8, 8, 8, 8),
        unet_widths=(8, 8, 16, 16),
        text_width=16,
        text_layers=1,
    )
