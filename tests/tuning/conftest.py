"""Tiny models and settings, so that whole training runs take seconds."""

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from tuning.loop import LoopSettings
from tuning.mini.folder import save_shell
from tuning.mini.models import new_unet
from tuning.mini.settings import STAGES, MiniSettings


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
    """SD 1.5's shape at widths of 16 to 32."""
    torch.manual_seed(0)
    return new_unet((16, 16, 24, 32), 32).eval()


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
