"""A UNet's folder: config.json and safetensors in the diffusers layout, read and written with what assembly changed."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from engines.bundle.folder import sha256
from tuning.checkpoints.weights import FileWeights, Weights, materialize, mmap_safetensors, shapes_of
from tuning.errors import TuningError
from tuning.surgery.changes import KEY, Changes, apply_changes

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = [
    "ASSEMBLY_NOTE",
    "load_unet",
    "meta_unet",
    "only_assembled",
    "save_part",
    "unet_from",
    "unet_weights",
    "weights_sha256",
]

ASSEMBLY_NOTE = "assembly.json"
"""The file that assembly writes beside the weights: from what and by which recipe they were taken, and their hash."""

_WEIGHTS = "diffusion_pytorch_model"


def save_part(model: Any, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes a diffusers or transformers model to `folder` in `dtype`; each file is replaced in one move.

    config.json comes last: a folder that has one has the weights too.
    """
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    # The copy takes these weights instead of copying its own: no second one in full precision, nor any in the dtype it has.
    cast = {id(w): nn.Parameter(w.detach().to(dtype), requires_grad=False) for w in model.parameters()}
    half: nn.Module = copy.deepcopy(model, cast).to(dtype)  # buffers are left to cast
    half.save_pretrained(temporary, safe_serialization=True)  # type: ignore[operator]
    config = json.loads((temporary / "config.json").read_text())
    config.pop("_name_or_path", None)  # where it was loaded from is nobody's business
    (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, folder / file.name)
    temporary.rmdir()


def load_unet(folder: Path) -> UNet2DConditionModel:
    """The UNet of a folder that `save_part` or diffusers wrote, float32, in evaluation mode.

    Raises:
        TuningError: the folder holds no UNet, its weights are pickled, damaged or others than its configuration needs.
    """
    unet = meta_unet(folder / "config.json")
    return materialize(unet, unet_weights(folder, unet))


def unet_weights(folder: Path, unet: nn.Module) -> Weights:
    """The weights in a UNet's folder; `unet` is made from its configuration, on whichever device. Errors as in `load_unet`."""
    files = _files(folder)

    def open_files() -> dict[str, Tensor]:
        return {name: tensor for file in files for name, tensor in mmap_safetensors(file).items()}

    shapes = shapes_of(unet)
    if unknown := sorted(open_files().keys() - shapes.keys()):
        raise TuningError(f"{folder}: the weights are not those of its config.json (it has no {unknown[0]}); get both again")
    return FileWeights(str(folder), shapes, open_files)


def weights_sha256(folder: Path) -> list[str]:
    """Hashes of the safetensors in a model's folder."""
    return [sha256(path) for path in sorted(folder.glob("*.safetensors"))]


def only_assembled(folder: Path) -> bool:
    """Whether a UNet's folder still holds what assembly wrote: nothing has been trained since."""
    try:
        note = json.loads((folder / ASSEMBLY_NOTE).read_text())
        return bool(note["weights_sha256"] == weights_sha256(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def meta_unet(path: Path) -> UNet2DConditionModel:
    """A UNet's shape from its config.json, on the meta device, in evaluation mode. Raises TuningError as `unet_from` does."""
    with torch.device("meta"):
        return unet_from(path).eval()


def unet_from(path: Path) -> UNet2DConditionModel:
    """A UNet with random weights from its config.json. Raises TuningError when the file is none of a UNet."""
    from diffusers import UNet2DConditionModel

    try:
        config = json.loads(path.read_text())
        kind = config.get("_class_name", "UNet2DConditionModel")
        if kind != "UNet2DConditionModel" or "cross_attention_dim" not in config:
            raise ValueError(f"it is that of {kind if '_class_name' in config else 'another kind of model'}")
        changes = Changes.model_validate(config.pop(KEY, None) or {})
        unet: UNet2DConditionModel = UNet2DConditionModel.from_config(config)
        apply_changes(unet, changes)
    except (OSError, ValueError, ValidationError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise TuningError(f"{path.parent} holds no UNet in the diffusers layout ({reason}): it needs a config.json") from error
    return unet


def _files(folder: Path) -> list[Path]:
    """The folder's safetensors file, or files where it is sharded."""
    files = sorted(folder.glob(f"{_WEIGHTS}*.safetensors"))
    plain = [file for file in files if file.name == f"{_WEIGHTS}.safetensors"]
    if not files:
        pickles = [file.name for file in folder.iterdir() if file.suffix in {".bin", ".pt", ".pth", ".ckpt"}]
        found = f"only {pickles[0]}, a pickle, which can run code when it is read" if pickles else "no weights"
        raise TuningError(f"{folder} has {found}: it needs {_WEIGHTS}.safetensors, as save_pretrained writes it")
    return plain or files
