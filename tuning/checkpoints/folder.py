"""A UNet's folder: config.json and safetensors in the diffusers layout, read and written with what assembly changed."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engines.bundle.folder import sha256
from engines.support.files import os_errors, partial_directory
from tuning.checkpoints.configs import Extent, check_extent, check_kinds
from tuning.checkpoints.files import read_json
from tuning.checkpoints.weight_files import find_weights
from tuning.checkpoints.weights import FileWeights, Weights, materialize, mmap_safetensors, shapes_in, shapes_of
from tuning.errors import TuningError
from tuning.surgery.changes import KEY, Changes, apply_changes
from tuning.surgery.meta import on_meta

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = [
    "ASSEMBLY_NOTE",
    "LORAS_NOTE",
    "extent_of",
    "load_unet",
    "meta_unet",
    "only_assembled",
    "save_part",
    "unet_files",
    "unet_from",
    "unet_weights",
    "weights_sha256",
]

ASSEMBLY_NOTE = "assembly.json"
"""The file that assembly writes beside the weights: from what and by which recipe they were taken, and their hash."""
LORAS_NOTE = "loras.json"
"""The file that names the LoRAs in the UNet that a folder's was made of; see ``tuning.loras.note``."""


def save_part(model: Any, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes a diffusers or transformers model to `folder` in `dtype`; each file is replaced in one move.

    config.json comes last: a folder that has one has the weights too.
    """
    # The copy takes these weights instead of copying its own: no second one in full precision, nor any in the dtype it has.
    cast = {id(w): nn.Parameter(w.detach().to(dtype), requires_grad=False) for w in model.parameters()}
    half: nn.Module = copy.deepcopy(model, cast).to(dtype)  # buffers are left to cast
    with partial_directory(folder) as temporary:
        with os_errors(temporary):
            half.save_pretrained(temporary, safe_serialization=True)  # type: ignore[operator]
        config = json.loads((temporary / "config.json").read_text())
        config.pop("_name_or_path", None)  # where it was loaded from is nobody's business
        (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, folder / file.name)


def load_unet(folder: Path, variant: str | None = None) -> UNet2DConditionModel:
    """The UNet of a folder that `save_part` or diffusers wrote, float32, in evaluation mode; `variant` as in `unet_weights`.

    Raises:
        TuningError: the folder holds no UNet, its weights are pickled, damaged or others than its configuration needs.
    """
    unet = meta_unet(folder / "config.json", extent_of(folder, variant))
    return materialize(unet, unet_weights(folder, unet, variant))


def unet_weights(folder: Path, unet: nn.Module, variant: str | None = None) -> Weights:
    """The weights in a UNet's folder.

    Args:
        folder: with config.json and safetensors.
        unet: made from its configuration, on whichever device.
        variant: of the files, where there are several; None for those without one, or the only one.

    Raises:
        TuningError: as in `load_unet`.
    """
    files = find_weights(folder, variant).files

    def open_files() -> dict[str, Tensor]:
        return {name: tensor for file in files for name, tensor in mmap_safetensors(file).items()}

    shapes, found = shapes_of(unet), {name: tensor.shape for name, tensor in open_files().items()}
    if unknown := sorted(found.keys() - shapes.keys()):
        raise TuningError(f"{folder}: the weights are not those of its config.json (it has no {unknown[0]}); get both again")
    weights = FileWeights(str(folder), shapes, open_files)
    weights.check(found)
    return weights


def extent_of(folder: Path, variant: str | None = None) -> Extent:
    """How much the weights in a part's folder can describe. Raises TuningError where they cannot be read."""
    return Extent.of({name: shape for file in find_weights(folder, variant).files for name, shape in shapes_in(file).items()})


def unet_files(folder: Path) -> Iterator[Path]:
    """Every file that reading a UNet's folder depends on. Raises TuningError where its weights are not whole."""
    yield folder / "config.json"
    yield from find_weights(folder).all
    yield from (note for name in (ASSEMBLY_NOTE, LORAS_NOTE) if (note := folder / name).is_file())


def weights_sha256(folder: Path) -> list[str]:
    """Hashes of the weights in a UNet's folder."""
    return [sha256(path) for path in find_weights(folder).files]


def only_assembled(folder: Path) -> bool:
    """Whether a UNet's folder still holds what assembly wrote: nothing has been trained since."""
    try:
        note = json.loads((folder / ASSEMBLY_NOTE).read_text())
        return bool(note["weights_sha256"] == weights_sha256(folder))
    except (OSError, ValueError, KeyError, TypeError):  # TuningError among them
        return False


def meta_unet(path: Path, extent: Extent | None = None) -> UNet2DConditionModel:
    """A UNet's shape from its config.json, on the meta device, in evaluation mode. Raises TuningError as `unet_from` does."""
    with on_meta():
        return unet_from(path, extent).eval()


def unet_from(path: Path, extent: Extent | None = None) -> UNet2DConditionModel:
    """A UNet with random weights from its config.json; `extent` is that of the weights that it is for.

    Raises:
        TuningError: the file is none of a UNet, or of one that its weights cannot be.
    """
    from diffusers import UNet2DConditionModel

    try:
        config = read_json(path)
        kind = config.get("_class_name", "UNet2DConditionModel")
        if kind != "UNet2DConditionModel" or "cross_attention_dim" not in config:
            raise ValueError(f"it is that of {kind if '_class_name' in config else 'another kind of model'}")
        check_kinds(config, UNet2DConditionModel)
        check_extent(config, extent)
        changes = Changes.model_validate(config.pop(KEY, None) or {})
        unet: UNet2DConditionModel = UNet2DConditionModel.from_config(config)
        apply_changes(unet, changes)
    except Exception as error:  # of many kinds: diffusers checks few of the numbers that it computes with
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TuningError(
            f"{path.parent} holds no UNet in the diffusers layout ({reason}); give the folder of one, with its config.json"
        ) from error
    return unet
