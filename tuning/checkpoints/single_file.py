"""A whole checkpoint in one .safetensors file, in the layout of CompVis' and Stability AI's own code.

Its tensors have other names than diffusers', and some another shape; diffusers' own converters say which. They only rename and
slice, so they run on tensors that are mapped from the file and not read yet.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Size, Tensor, nn

from tuning.checkpoints.compvis_layout import unet_state
from tuning.checkpoints.weights import FileWeights, Weights, check_floating, mmap_safetensors, shapes_in, shapes_of
from tuning.errors import TuningError

__all__ = [
    "GIVE_CONFIG",
    "check_converted",
    "check_single_file",
    "has_only_averages",
    "misfit",
    "shapes_in_file",
    "single_file_weights",
    "text_width_in_file",
    "vae_tensors",
]

GIVE_CONFIG = "give --config DIR (python -m exporter build), a diffusers folder with the configurations of this model"
"""Advice for weights that are of no known family."""

Named = TypeVar("Named", Tensor, Size)
_PREFIX = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
_OPEN_CLIP = f"{_PREFIX['text_encoder']}model."
_AVERAGED = "model_ema.diffusion_model"
"""Of averaged weights of the UNet (EMA), whose names have no dots in them."""
_NAMES = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder"}


def check_single_file(path: Path) -> None:
    """Raise TuningError unless the file is a safetensors file that has a UNet in CompVis' layout."""
    names = mmap_safetensors(path)
    if any(name.startswith("conditioner.") for name in names):
        raise TuningError(f"source {path} is a checkpoint of SDXL; only Stable Diffusion 1.x and 2.x are supported")
    if not _of_part(names, "unet"):
        raise TuningError(f"source {path} is no checkpoint in CompVis' layout ({_what_else(names)}")


def shapes_in_file(path: Path, part: str) -> dict[str, Size]:
    """Name -> shape of the file's tensors of one part. Raises TuningError where the file cannot be read."""
    return _of_part(shapes_in(path), part)


def has_only_averages(names: Iterable[str]) -> bool:
    """Whether a file has a UNet's averaged weights, and no others of it. Of both diffusers takes the others."""
    names = list(names)
    return any(name.startswith(_AVERAGED) for name in names) and not any(name.startswith(_PREFIX["unet"]) for name in names)


def _of_part(named: Mapping[str, Named], part: str) -> dict[str, Named]:
    """The tensors of a part, chosen by their names."""
    prefix = _AVERAGED if part == "unet" and has_only_averages(named) else _PREFIX[part]
    return {name: value for name, value in named.items() if name.startswith(prefix)}


def _what_else(names: Mapping[str, Tensor]) -> str:
    """A guess of what the file is, and advice."""
    if any("lora" in name for name in names):
        return "it is a LoRA): give its checkpoint as the source, and it with --lora FILE (python -m exporter build)"
    if "down_blocks.0.resnets.0.conv1.weight" in names:
        return "it is a diffusers UNet): put it into a folder as diffusion_pytorch_model.safetensors, with its config.json"
    return f"no tensor is called {_PREFIX['unet']}*): give one that has UNet, VAE and text encoder, or a diffusers folder"


def text_width_in_file(path: Path) -> int | None:
    """The width of the text that the file's UNet reads, where it reads any."""
    for name, tensor in _of_part(mmap_safetensors(path), "unet").items():
        if name.replace(".", "").endswith("attn2to_kweight"):
            return int(tensor.shape[1])
    return None


def single_file_weights(path: Path, part: str, module: nn.Module, configured_by: Path) -> Weights:
    """The weights of one part of the file.

    Args:
        path: one that `check_single_file` has passed.
        part: unet, vae or text_encoder.
        module: what they are for; on the meta device will do.
        configured_by: the folder that the module was configured by, for errors.

    Raises:
        TuningError: the file lacks the part, or its tensors are not those that the module needs.
    """
    shapes = shapes_of(module)

    def open_file() -> dict[str, Tensor]:
        return _CONVERT[part](_of_part(mmap_safetensors(path), part), module)

    if not shapes_in_file(path, part):
        raise TuningError(f"source {path} has no {_NAMES[part]}: no tensor is called {_PREFIX[part]}*; give a whole checkpoint")
    check_floating(path, _AVERAGED if part == "unet" and has_only_averages(mmap_safetensors(path)) else _PREFIX[part])
    refuse = partial(misfit, path, part, configured_by)
    found = check_converted(open_file, shapes, refuse)
    if part == "unet" and (unknown := sorted(found - shapes.keys())):
        raise refuse(f"it has no {unknown[0]}")
    return FileWeights(str(path), shapes, open_file)


def check_converted(
    open_file: Callable[[], Mapping[str, Tensor]], shapes: Mapping[str, Size], refuse: Callable[[str], TuningError]
) -> set[str]:
    """The names of a file's tensors, converted. Raises what ``refuse`` makes of a reason where they are not of these shapes."""
    try:
        found = open_file()
    except Exception as error:  # of many kinds: the converters check nothing
        raise refuse(f"{type(error).__name__} {error}") from error
    for name, wanted in shapes.items():
        got = found[name].shape if name in found else None
        if got != wanted:
            raise refuse(f"{name} {'is missing' if got is None else f'is {tuple(got)}'}")
    return set(found)


def misfit(path: Path, part: str, configured_by: Path, reason: str) -> TuningError:
    """The error that says that a part of the file is not what its configuration describes."""
    described = configured_by / part
    return TuningError(f"source {path}: its {_NAMES[part]} is not what {described} describes ({reason}); {GIVE_CONFIG}")


def _unet(tensors: dict[str, Tensor], module: Any) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    strange: dict[str, Tensor] = {}
    if has_only_averages(tensors):
        dotted = {f"model_ema.{name.partition('.')[2].replace('.', '')}": name for name in unet_state(module)}
        strange = {name: tensor for name, tensor in tensors.items() if name not in dotted}
        tensors = {name: tensors[flat] for flat, name in dotted.items() if flat in tensors}
    converted: dict[str, Tensor] = convert_ldm_unet_checkpoint(tensors, module.config)
    return converted | strange


def vae_tensors(tensors: dict[str, Tensor], module: Any) -> dict[str, Tensor]:
    """A VAE's tensors under diffusers' names; all that the file's original code calls it, with its prefix or without."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    converted: dict[str, Tensor] = convert_ldm_vae_checkpoint(tensors, module.config)
    return converted


def _text_encoder(tensors: dict[str, Tensor], module: Any) -> dict[str, Tensor]:
    """OpenAI's CLIP or, in Stable Diffusion 2.x, OpenCLIP; its tensors are called as the installed transformers has them."""
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint

    if any(name.startswith(_OPEN_CLIP) for name in tensors):
        converted = convert_open_clip_checkpoint(module, tensors, prefix=_OPEN_CLIP)
    else:
        converted = convert_ldm_clip_checkpoint(tensors)
    if hasattr(module, "text_model"):
        return dict(converted)
    return {name.removeprefix("text_model."): tensor for name, tensor in converted.items()}


_CONVERT: dict[str, Callable[[dict[str, Tensor], Any], dict[str, Tensor]]] = {
    "unet": _unet,
    "vae": vae_tensors,
    "text_encoder": _text_encoder,
}
