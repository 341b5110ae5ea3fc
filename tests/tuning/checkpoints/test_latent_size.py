"""The size that a UNet was made for, as diffusers' pipelines have it after they have loaded it."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict

from tests.support.reference import MINI
from tuning.checkpoints.configs import latent_size


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return dict(StableDiffusionPipeline.from_pretrained(MINI).components)


@pytest.mark.parametrize("version", ["0.6.0", "0.8.1", "0.9.0.dev0", "0.9.0", "0.42.1", None])
@pytest.mark.parametrize("size", [8, 32, 63, 64, 96])
def test_as_the_pipeline_as_loaded(parts: dict[str, Any], size: int, version: str | None) -> None:
    written = {"sample_size": size} | ({} if version is None else {"_diffusers_version": version})
    unet: UNet2DConditionModel = parts["unet"]
    before = unet._internal_dict
    unet._internal_dict = FrozenDict({key: value for key, value in before.items() if key != "_diffusers_version"} | written)
    ours = latent_size(unet.config)
    StableDiffusionPipeline(**parts, requires_safety_checker=False)
    loaded = unet.config.sample_size
    unet._internal_dict = before
    assert ours == (loaded, loaded)
