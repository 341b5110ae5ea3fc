"""The nodes, in the form that ComfyUI asks of custom ones. ComfyUI's own modules are imported when a node runs or is listed."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines import ENGINES, BundleError
from engines.bundle.folder import MANIFEST_NAME, sha256
from runtime import PRESETS, find_plan, load
from serving.comfyui.bundle_module import PLAN
from serving.comfyui.model import LATENT_SCALE, make_model

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "BundleDecode", "BundleEncode", "ChoosePlan", "LoadBundle"]

FOLDER = "unet_heirloom"
"""In ComfyUI's folder of models: where bundles are looked for."""


def _bundles() -> Path:
    import folder_paths

    return Path(folder_paths.models_dir) / FOLDER


class LoadBundle:
    """A bundle of ComfyUI's models folder as MODEL, and as what its own text encoder and VAE are used with."""

    RETURN_TYPES = ("MODEL", "HEIRLOOM_BUNDLE")
    FUNCTION = "load"
    CATEGORY = "loaders/UNet Heirloom"
    DESCRIPTION = "Loads a bundle from models/unet_heirloom. MODEL goes into KSampler, or first into Choose Plan."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The bundles that there are, and the engines."""
        names = sorted(path.parent.name for path in _bundles().glob(f"*/{MANIFEST_NAME}"))
        return {"required": {"bundle": (names,), "engine": ([name for name in ENGINES if name != "null"],)}}

    @classmethod
    def IS_CHANGED(cls, bundle: str, engine: str) -> str:
        """Another text where the bundle was built anew."""
        manifest = _bundles() / bundle / MANIFEST_NAME
        return sha256(manifest) if manifest.is_file() else ""

    def load(self, bundle: str, engine: str) -> tuple[Any, Any]:
        """The MODEL, and the loaded bundle."""
        if Path(bundle).name != bundle:
            raise BundleError(f"{bundle!r:.100} is no name of a bundle in {_bundles()}; choose one of the list")
        pipeline = load(_bundles() / bundle, engine)
        return make_model(pipeline), pipeline


class ChoosePlan:
    """The same MODEL with a plan: what is computed at which step, and what is inherited."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "choose"
    CATEGORY = "loaders/UNet Heirloom"
    DESCRIPTION = "A preset, or `other` with a plan such as deepcache:3+guide:2, or the path of a .json file."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """A list of presets, and a field for others."""
        presets = [preset.example for preset in PRESETS.values()]
        return {
            "required": {"model": ("MODEL",), "plan": (["full", *[name for name in presets if name != "full"], "other"],)},
            "optional": {"other": ("STRING", {"default": ""})},
        }

    def choose(self, model: Any, plan: str, other: str = "") -> tuple[Any]:
        """A copy of the MODEL that shares the loaded bundle; raises PlanError, or BundleError for a MODEL that is none."""
        from serving.comfyui.bundle_module import BundleModule

        if not isinstance(getattr(model.model, "diffusion_model", None), BundleModule):
            raise BundleError("this MODEL is no bundle, and plans are for bundles alone; connect Load Bundle")
        chosen = find_plan(other.strip() if plan == "other" else plan)
        copy = model.clone()
        copy.model_options.setdefault("transformer_options", {})[PLAN] = chosen
        return (copy,)


class BundleEncode:
    """A prompt as CONDITIONING by the bundle's own text encoder; ComfyUI's for the same model does as well."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"
    CATEGORY = "conditioning/UNet Heirloom"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """A bundle and a prompt."""
        return {"required": {"bundle": ("HEIRLOOM_BUNDLE",), "text": ("STRING", {"multiline": True})}}

    def encode(self, bundle: Any, text: str) -> tuple[list[Any]]:
        """Text features (1, tokens, width)."""
        return ([[bundle.encode([text]).float().cpu(), {}]],)


class BundleDecode:
    """Pictures from latents by the bundle's own VAE; ComfyUI's for the same model does as well."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "decode"
    CATEGORY = "latent/UNet Heirloom"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """A bundle and latents."""
        return {"required": {"bundle": ("HEIRLOOM_BUNDLE",), "samples": ("LATENT",)}}

    def decode(self, bundle: Any, samples: dict[str, Any]) -> tuple[torch.Tensor]:
        """Pictures (rows, height, width, 3) from 0 to 1."""
        pictures = bundle.decode(samples["samples"].to(bundle.engine.device) * LATENT_SCALE)
        return (torch.from_numpy(np.stack([np.asarray(picture, np.float32) / 255 for picture in pictures])),)


NODE_CLASS_MAPPINGS = {
    "UNetHeirloomLoadBundle": LoadBundle,
    "UNetHeirloomChoosePlan": ChoosePlan,
    "UNetHeirloomEncode": BundleEncode,
    "UNetHeirloomDecode": BundleDecode,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "UNetHeirloomLoadBundle": "Load Bundle (UNet Heirloom)",
    "UNetHeirloomChoosePlan": "Choose Plan (UNet Heirloom)",
    "UNetHeirloomEncode": "Encode Prompt with Bundle (UNet Heirloom)",
    "UNetHeirloomDecode": "Decode Latents with Bundle (UNet Heirloom)",
}
