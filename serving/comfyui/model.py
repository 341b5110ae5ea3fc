"""A bundle as ComfyUI's MODEL."""

from typing import Any

from torch import Tensor

from engines.bundle.names import STEM
from runtime import Pipeline, RequestError
from runtime.images.schedulers import make_scheduler
from serving.comfyui.bundle_module import BundleModule

__all__ = ["LATENT_SCALE", "make_model"]

LATENT_SCALE = 0.18215
"""Of SD 1.x and 2.x: what latents are multiplied with between ComfyUI's VAE and the UNet."""


def make_model(pipeline: Pipeline) -> Any:
    """A ``ModelPatcher`` that ComfyUI's samplers take.

    Raises:
        RequestError: the bundle's latents are of another kind than ComfyUI's for SD 1.x and 2.x, or its predictions are.
        BundleError: its scheduler's configuration cannot be read.
    """
    from comfy import latent_formats, model_base, model_management, model_patcher, supported_models_base

    manifest = pipeline.manifest
    if (manifest.latent_channels, manifest.vae_scale) != (4, 8):
        raise RequestError(
            f"latents of this bundle have {manifest.latent_channels} channels and a side for {manifest.vae_scale} pixels; "
            "these nodes take those with 4 channels and a side for 8 pixels, as SD 1.x and 2.x have"
        )
    scheduler = make_scheduler("ddim", pipeline.bundle.folder / "scheduler", 1)
    types = {"epsilon": model_base.ModelType.EPS, "v_prediction": model_base.ModelType.V_PREDICTION}
    kind = scheduler.config.prediction_type
    if kind not in types:
        raise RequestError(f"this bundle's UNet predicts {kind!r:.60}; these nodes take {' and '.join(types)}")
    channels = manifest.features[STEM].shape[1]  # what nodes that change layers look at, before they are refused
    settings = {"in_channels": manifest.latent_channels, "model_channels": channels, "disable_unet_model_creation": True}
    config = supported_models_base.BASE(settings)
    config.latent_format = latent_formats.SD15(LATENT_SCALE)
    model = model_base.BaseModel(config, types[kind])
    levels = scheduler.alphas_cumprod
    model.model_sampling.set_sigmas(((1 - levels) / levels) ** 0.5)
    model.model_sampling.num_timesteps = len(levels)

    def timestep_of(sigmas: Tensor) -> Tensor:
        found: Tensor = model.model_sampling.timestep(sigmas)
        return found

    model.diffusion_model = BundleModule(pipeline, timestep_of)
    return model_patcher.ModelPatcher(model, model_management.get_torch_device(), model_management.unet_offload_device())
