"""A LoRA's file: which weights of UNet and text encoder it changes, and by which of its tensors.

Files name their tensors in several ways: kohya's scripts, diffusers as it was and is, and peft. diffusers' own converters say
which module is meant; they only rename, so they are given the names alone. What the file adds to a weight is
``alpha / rank * up @ down`` (Hu et al., LoRA, arXiv 2106.09685); a kernel's ``down`` has the kernel's size (LoCon).
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Size, Tensor

from engines.support.records import one_line
from tuning.checkpoints.weights import metadata_of, mmap_safetensors
from tuning.errors import TuningError
from tuning.loras.lora import Lora

__all__ = ["LoraFile", "LoraLayer", "fitted", "read_lora"]

_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_PARTS = ("unet", "text_encoder")
_KINDS = {
    "a DoRA": r"\.(dora_scale|lora_magnitude_vector)", "a LoHa": r"\.hada_", "a LoKr": r"\.lokr_", "an OFT": r"\.oft_",
    "a LoCon in Tucker's form": r"\.lora_mid\.", "a difference of whole weights": r"\.diff(_b)?$",
}  # fmt: skip
"""Other kinds of adapters, by what the names of their tensors have in them."""
_TENSOR = re.compile(r"(unet|text_encoder)\.(.+)\.lora_([AB])\.weight")
_STEM = re.compile(r"[._]lora(_linear_layer)?[._](down|A)[._]")
"""The text that follows a layer's own name in the name of its down tensor, whichever program wrote it."""
_FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
"""By the width of the text that a UNet's cross attentions read."""
_READS_TEXT = re.compile(r"attn2\.to_[kv]$")


@dataclass(frozen=True)
class LoraLayer:
    """The change of one weight by a file: ``factor`` times the product of its tensors of these names."""

    up: str
    down: str
    factor: float
    shapes: tuple[Size, Size]
    """Of both tensors: (out, rank) and (rank, in), kernels with their sides."""


@dataclass(frozen=True)
class LoraFile:
    """A file's layers by the part that they belong to and the module in it, as diffusers and transformers name both."""

    lora: Lora
    layers: Mapping[str, Mapping[str, LoraLayer]]


def read_lora(lora: Lora, unet: Any) -> LoraFile:
    """Read which layers a file has; all of its numbers are looked at once.

    Args:
        lora: which file.
        unet: the configuration of the UNet that it is for, whose numbers of layers some names are counted by.

    Raises:
        TuningError: the file is missing, damaged or no LoRA, one for SDXL, of a kind that is not supported, or has tensors that
            do not belong together or are not finite.
    """
    lora.check()
    tensors = mmap_safetensors(lora.path)
    _check_kind(lora, tensors)
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    names = {name for name in tensors if not name.endswith(".alpha")}
    renamed = _renamed(lora, names, unet)
    unknown = sorted(names - set(renamed.values()))  # a converter leaves out some that it does not expect
    for name, theirs in renamed.items():
        if (found := _TENSOR.fullmatch(name)) is None:
            unknown.append(theirs)
        else:
            pairs.setdefault((found[1], found[2]), {})[found[3]] = theirs
    if unknown or not pairs:
        raise TuningError(f"LoRA {lora.path}: {_strangers(unknown, len(tensors))}; give the file of a LoRA")
    alphas = _Alphas(lora, tensors)
    layers: dict[str, dict[str, LoraLayer]] = {part: {} for part in _PARTS}
    for (part, module), pair in pairs.items():
        layers[part][module] = _layer(lora, part, module, pair, tensors, alphas)
    alphas.check_used()
    return LoraFile(lora, layers)


def _check_kind(lora: Lora, tensors: Mapping[str, Tensor]) -> None:
    """Raise TuningError for what is no LoRA, or of a kind that cannot be fused here, and for numbers that are none."""
    for kind, pattern in _KINDS.items():
        if found := [name for name in tensors if re.search(pattern, name)]:
            raise TuningError(
                f"LoRA {lora.path} is {kind} ({found[0]:.200}), and only LoRA and LoCon are supported: fuse it with the program "
                "that it was trained with, and give the checkpoint that this writes as the source"
            )
    if not any("lora" in name for name in tensors):
        first = next(iter(tensors), "none")
        raise TuningError(f"LoRA {lora.path} is no LoRA: no tensor's name has lora in it (the first: {first:.200})")
    if any(name.startswith(("lora_te2_", "text_encoder_2.")) for name in tensors):
        raise TuningError(f"LoRA {lora.path} is for SDXL: it has layers for a second text encoder; {_give(None)}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise TuningError(f"LoRA {lora.path}: {name:.200} holds what is no finite floating-point number; get the file again")


def _renamed(lora: Lora, names: Iterable[str], unet: Any) -> dict[str, str]:
    """The names ``PART.MODULE.lora_A.weight`` (down) and ``lora_B`` (up) of a file's tensors -> the file's own."""
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )
    from diffusers.utils.state_dict_utils import DIFFUSERS_OLD_TO_PEFT, UNET_TO_DIFFUSERS, convert_state_dict

    own = {name: name for name in names}
    try:
        if any(name.startswith(_KOHYA) for name in own):
            own, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(own, unet))
    except Exception as error:  # of many kinds: the converters check nothing
        raise TuningError(
            f"LoRA {lora.path}: its layers have names that diffusers cannot read ({one_line(error, 200)}); "
            "give the file of a LoRA for Stable Diffusion, as kohya's scripts, diffusers or peft write it"
        ) from error
    text = {name: theirs for name, theirs in own.items() if name.startswith("text_encoder.")}
    of_unet = {name if name.startswith("unet.") else f"unet.{name}": own[name] for name in own.keys() - text.keys()}
    renamed: dict[str, str] = convert_state_dict(of_unet, UNET_TO_DIFFUSERS) | convert_state_dict(text, DIFFUSERS_OLD_TO_PEFT)
    return dict(sorted(renamed.items()))


def _layer(
    lora: Lora, part: str, module: str, pair: Mapping[str, str], tensors: Mapping[str, Tensor], alphas: "_Alphas"
) -> LoraLayer:
    if pair.keys() != {"A", "B"}:
        raise TuningError(f"LoRA {lora.path}: {next(iter(pair.values())):.200} has no counterpart; get the file again")
    up, down = tensors[pair["B"]].shape, tensors[pair["A"]].shape
    if min(len(up), len(down)) < 2 or up[1] != down[0] or not up[1]:
        raise TuningError(
            f"LoRA {lora.path}: the tensors of {part} {module:.200} are {tuple(up)} and {tuple(down)}, and a layer's have one "
            "rank: (out, rank) and (rank, in); get the file again"
        )
    return LoraLayer(pair["B"], pair["A"], alphas.factor(part, module, pair["A"], down[0]), (up, down))


class _Alphas:
    """The factors of a file's layers: alpha over rank, by tensors of that name or by peft's settings in the file's header."""

    def __init__(self, lora: Lora, tensors: Mapping[str, Tensor]) -> None:
        self._path = lora.path
        self._given = {name: tensor for name, tensor in tensors.items() if name.endswith(".alpha")}
        self._unused = set(self._given)
        self._settings = self._read_settings(lora)

    def factor(self, part: str, module: str, down: str, rank: int) -> float:
        """Of one layer; without an alpha it is 1, as in diffusers."""
        name = f"{_STEM.split(down)[0]}.alpha"
        if (given := self._given.get(name)) is not None:
            self._unused.discard(name)
            if given.numel() != 1:
                raise TuningError(f"LoRA {self._path}: {name:.200} is {tuple(given.shape)}, and must be one number")
            return float(given) / rank
        settings = self._settings.get(part, {})
        alpha = _by_pattern(settings.get("alpha_pattern") or {}, module, settings.get("lora_alpha", rank))
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise TuningError(f"LoRA {self._path}: its header has the alpha {alpha!r:.40} for {module:.200}, which is no number")
        return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") is True else rank)

    def check_used(self) -> None:
        """Raise TuningError where an alpha belongs to no layer."""
        if self._unused:
            raise TuningError(f"LoRA {self._path}: {min(self._unused):.200} belongs to no layer of it; get the file again")

    def _read_settings(self, lora: Lora) -> dict[str, dict[str, Any]]:
        """peft's settings of each part, which diffusers writes into the header."""
        found = metadata_of(lora.path).get("lora_adapter_metadata")
        try:
            read = json.loads(found) if found else {}
            if not isinstance(read, dict):
                raise ValueError("it is no object")
        except (ValueError, RecursionError) as error:
            raise TuningError(
                f"LoRA {lora.path}: lora_adapter_metadata in its header cannot be read ({one_line(error, 100)})"
            ) from error
        settings: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
        for name, value in read.items():
            part, _, setting = name.partition(".")
            settings.get(part, {})[setting] = value
        for each in settings.values():
            if each.get("use_dora") or not isinstance(each.get("alpha_pattern") or {}, dict):
                raise TuningError(
                    f"LoRA {lora.path}: its header asks for a DoRA or a pattern that is none; only LoRA is supported"
                )
        return settings


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the pattern that a module's name ends in, as in peft; patterns are names here, not expressions."""
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^")
        if module == name or (name == pattern and module.endswith(f".{name}")):
            return value
    return default


def fitted(file: LoraFile, part: str, shapes: Mapping[str, Size]) -> dict[str, LoraLayer]:
    """A file's layers of one part by the name of the weight that each changes.

    Args:
        file: from ``read_lora``.
        part: ``unet`` or ``text_encoder``.
        shapes: of the source's weights of that part.

    Raises:
        TuningError: layers are of weights that the source does not have, or of another shape.
    """
    path, layers = file.lora.path, file.layers[part]
    named = {module: _weight_of(module, shapes) for module in layers}
    _check_family(file, named, shapes)
    if unknown := sorted(module for module, weight in named.items() if weight is None):
        raise TuningError(f"LoRA {path}: {_strangers(unknown, len(layers), f'{part} layers')}; {_give(None)}")
    found = {weight: layers[module] for module, weight in named.items() if weight is not None}
    for weight, layer in found.items():
        _check_shape(file, weight, layer, shapes[weight])
    return found


def _weight_of(module: str, shapes: Mapping[str, Size]) -> str | None:
    """The weight of a module; a text encoder's names may have a prefix that some versions of transformers leave out."""
    names = (module, module.removeprefix("text_model."), f"text_model.{module}")
    return next((f"{name}.weight" for name in names if f"{name}.weight" in shapes), None)


def _check_family(file: LoraFile, named: Mapping[str, str | None], shapes: Mapping[str, Size]) -> None:
    """Raise TuningError where its UNet reads text of another width: Stable Diffusion 1.x, 2.x and XL have one each."""
    widths = {int(file.layers["unet"][module].shapes[1][1]) for module in file.layers["unet"] if _READS_TEXT.search(module)}
    own = next((int(shape[1]) for name, shape in shapes.items() if _READS_TEXT.search(name.removesuffix(".weight"))), None)
    if own is not None and widths and own not in widths:
        width = widths.pop()
        family = f" ({_FAMILIES[width]})" if width in _FAMILIES else ""
        raise TuningError(
            f"LoRA {file.lora.path} is for a UNet that reads text of width {width}{family}, and the source's reads {own}; "
            f"{_give(own)}"
        )


def _check_shape(file: LoraFile, name: str, layer: LoraLayer, shape: Size) -> None:
    up, down = layer.shapes
    got, wanted = (up[0], *down[1:]), tuple(shape)
    plain = [tuple(side for side in each[2:] if side != 1) for each in (up, got, wanted)]  # 1x1 kernels are matrices
    if len(wanted) < 2 or got[:2] != wanted[:2] or plain[0] or plain[1] != plain[2]:
        raise TuningError(
            f"LoRA {file.lora.path}: for {name} it has {tuple(up)} and {tuple(down)}, and the source's is {wanted}; "
            "give one that was trained for this source"
        )


def _strangers(names: list[str], count: int, what: str = "tensors") -> str:
    if not names:
        return f"none of its {count} {what} is of a layer"
    return f"{len(names)} of its {count} {what} match no layer of the source (the first: {names[0]:.200})"


def _give(width: int | None) -> str:
    """Advice on which LoRA to give instead."""
    return f"give one for {_FAMILIES.get(width, 'the source') if width else 'the model that the source is made from'}"
