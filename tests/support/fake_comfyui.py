"""Stand-ins for those of ComfyUI's modules that the nodes use, with the names that its custom nodes may rely on."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

__all__ = ["install"]


class ModelSampling(nn.Module):
    """Noise levels of a discrete schedule, and the nearest timestep of each."""

    def set_sigmas(self, sigmas: Tensor) -> None:
        self.sigmas = sigmas.float()

    def timestep(self, sigma: Tensor) -> Tensor:
        return (sigma.log() - self.sigmas.log()[:, None]).abs().argmin(dim=0)


class BaseModel(nn.Module):
    def __init__(self, config: Any, model_type: str) -> None:
        super().__init__()
        assert config.unet_config["disable_unet_model_creation"]
        self.latent_format, self.model_type, self.model_sampling = config.latent_format, model_type, ModelSampling()
        self.diffusion_model: Any = None
        self.channels = config.unet_config["model_channels"]


class ModelPatcher:
    def __init__(self, model: Any, load_device: torch.device, offload_device: torch.device) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> ModelPatcher:
        found = copy.copy(self)
        found.model_options = copy.deepcopy(self.model_options)
        return found


def install(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the modules found by import until the test's end."""
    cpu = torch.device("cpu")
    parts: dict[str, dict[str, Any]] = {
        "latent_formats": {"SD15": lambda scale: SimpleNamespace(scale_factor=scale)},
        "model_base": {"BaseModel": BaseModel, "ModelType": SimpleNamespace(EPS="eps", V_PREDICTION="v")},
        "model_management": {"get_torch_device": lambda: cpu, "unet_offload_device": lambda: cpu},
        "model_patcher": {"ModelPatcher": ModelPatcher},
        "supported_models_base": {"BASE": lambda config: SimpleNamespace(unet_config=config)},
    }
    root = ModuleType("comfy")
    monkeypatch.setitem(sys.modules, "comfy", root)
    for name, names in parts.items():
        module = ModuleType(f"comfy.{name}")
        vars(module).update(names)
        setattr(root, name, module)
        monkeypatch.setitem(sys.modules, f"comfy.{name}", module)
    folders = ModuleType("folder_paths")
    folders.models_dir = str(models)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "folder_paths", folders)
