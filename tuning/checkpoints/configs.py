"""Configurations of a checkpoint's parts: what they mean where diffusers allows several forms, and whether they are sane.

A model is made from its configuration before its weights are read, so numbers in it are held against the tensors that there are:
no model is begun that has more layers than they, or wider ones.
"""

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Size

from tuning.errors import TuningError

__all__ = ["Extent", "check_channels", "check_extent", "check_fit", "check_kinds", "latent_size", "text_settings", "text_width"]

_USUAL_LATENTS = 64
"""Side in latents where a configuration names none, as diffusers' pipelines have it for Stable Diffusion."""
_COLOURS = 3
_LARGEST_LATENTS = 4096
_LARGEST_NUMBER = 10_000_000
_COUNTS = {
    "layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block", "num_hidden_layers",
    "num_encoder_blocks", "num_decoder_blocks",
}  # fmt: skip
_WIDTHS = {
    "block_out_channels", "in_channels", "out_channels", "latent_channels", "cross_attention_dim", "hidden_size",
    "intermediate_size", "vocab_size", "max_position_embeddings", "encoder_block_out_channels", "decoder_block_out_channels",
}  # fmt: skip


@dataclass(frozen=True)
class Extent:
    """How many tensors a part's files hold, and the longest side of any of them."""

    tensors: int
    longest: int

    @classmethod
    def of(cls, shapes: Mapping[str, Size]) -> "Extent":
        """The extent of tensors of these shapes."""
        return cls(len(shapes), max((side for shape in shapes.values() for side in shape), default=0))


_KINDS: dict[type, str] = {bool: "neither true nor false", str: "no text", int: "no number", float: "no number"}
_UNKNOWN = Extent(10_000, 1_000_000)
"""Where there are no files, as for random weights."""


def check_extent(config: Mapping[str, Any], extent: Extent | None) -> None:
    """Raise ValueError where a configuration asks for more, or wider, layers than the files can hold."""
    extent = extent or _UNKNOWN
    if config.get("quantization_config") is not None:
        raise ValueError("it describes quantized weights, and what is built is made of floating-point ones")
    for name, value in config.items():
        for number in _numbers(value):
            if abs(number) > _LARGEST_NUMBER or (name in _COUNTS | _WIDTHS and number < 1):
                raise ValueError(f"{name} is {value!r:.40}")
            if name in _WIDTHS and number > extent.longest:
                raise ValueError(f"{name} is {value!r:.40}, and no tensor of its weights is wider than {extent.longest}")
            if name in _COUNTS and number > extent.tensors:
                raise ValueError(f"{name} is {value!r:.40}, and its weights are {extent.tensors} tensors")
    blocks = max((len(value) for value in config.values() if isinstance(value, list | tuple)), default=0)
    layers = blocks * max((n for name in _COUNTS for n in _numbers(config.get(name))), default=1)
    if blocks > extent.tensors or layers > 2 * extent.tensors:
        raise ValueError(f"it describes some {max(blocks, layers)} layers, and its weights are {extent.tensors} tensors")


def check_kinds(config: Mapping[str, Any], made: type) -> None:
    """Raise ValueError where a value is of another kind than the default of the diffusers class that takes it.

    Most may be null, and a list of such values, one for each block; a number of floating point may be neither.
    """
    for name, parameter in inspect.signature(made.__init__).parameters.items():  # type: ignore[misc]
        value, kind = config.get(name, parameter.default), type(parameter.default)
        if kind not in _KINDS or (value is None and kind is not float):
            continue
        if not all(_is_of(kind, each) for each in ([value] if kind is float else _flat(value))):
            raise ValueError(f"{name} is {value!r:.40}, {_KINDS[kind]}")


def _is_of(kind: type, value: Any) -> bool:
    if kind in (bool, str) or isinstance(value, bool):
        return isinstance(value, kind)
    return isinstance(value, int | float) and math.isfinite(value)


def _flat(value: Any) -> list[Any]:
    """A value, or those in a list, at most two deep."""
    outer = value if isinstance(value, list | tuple) else [value]
    return [item for each in outer for item in (each if isinstance(each, list | tuple) else [each])]


def _numbers(value: Any, depth: int = 0) -> Iterator[int]:
    """The whole numbers in a value, in lists too."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list | tuple) and depth < 4:
        for item in value:
            yield from _numbers(item, depth + 1)


def latent_size(unet: Any) -> tuple[int, int]:
    """Height and width in latents that a UNet was made for: its ``sample_size``, one number, two or none.

    Of configurations written before diffusers 0.9 its pipelines take one number below 64 for 64, as they load them.

    Raises:
        TuningError: it is something else.
    """
    given = unet.sample_size
    sides = (_USUAL_LATENTS,) * 2 if given is None else tuple(given) if isinstance(given, list | tuple) else (given, given)
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= _LARGEST_LATENTS for side in sides):
        raise TuningError(
            f"the UNet's configuration has sample_size = {given!r:.60}; it is a side in latents, a pair of them, or null"
        )
    if isinstance(given, int) and given < _USUAL_LATENTS and _is_before_0_9(getattr(unet, "_diffusers_version", None)):
        return _USUAL_LATENTS, _USUAL_LATENTS
    return sides[0], sides[1]


def _is_before_0_9(written: Any) -> bool:
    found = re.match(r"(\d{1,4})\.(\d{1,4})", written) if isinstance(written, str) else None
    return found is not None and (int(found[1]), int(found[2])) < (0, 9)


def text_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of the text encoder in its configuration, which may be that of the whole of CLIP."""
    inner = config.get("text_config")
    return inner if config.get("model_type") == "clip" and isinstance(inner, dict) else config


def text_width(unet: Any) -> int:
    """The width of the text that a UNet reads: ``cross_attention_dim``, one number or the same one for every block.

    Raises:
        TuningError: it is something else.
    """
    given = unet.cross_attention_dim
    widths = set(given) if isinstance(given, list | tuple) else {given}
    if len(widths) != 1 or type(width := widths.pop()) is not int:
        raise TuningError(f"the UNet's configuration has cross_attention_dim = {given!r:.60}; all of its blocks read one text")
    return width


def check_fit(name: str, unet: Any, vae: Any, text: Any) -> None:
    """Raise TuningError unless the configurations of UNet, VAE (if there is one) and text encoder fit together."""
    check_channels(name, unet, vae.latent_channels if vae else unet.out_channels)
    if vae and (vae.in_channels, vae.out_channels) != (_COLOURS, _COLOURS):
        raise TuningError(
            f"source {name}: its VAE takes pictures of {vae.in_channels} channels and gives {vae.out_channels}, and pictures "
            f"have {_COLOURS}, red, green and blue; give one for them"
        )
    latent_size(unet)
    if text_width(unet) != text.hidden_size:
        raise TuningError(
            f"source {name}: its UNet reads text of width {unet.cross_attention_dim} and its text encoder writes "
            f"{text.hidden_size}; take both from the same checkpoint"
        )
    if unet.time_embedding_type != "positional":
        raise TuningError(
            f"source {name}: its UNet has time_embedding_type = {unet.time_embedding_type!r}, not 'positional' as Stable "
            "Diffusion 1.x and 2.x have it: give another checkpoint"
        )


def check_channels(name: str, unet: Any, latent: int) -> None:
    """Raise TuningError unless a UNet of this configuration takes and gives latents of so many channels."""
    if (unet.in_channels, unet.out_channels) != (latent, latent):
        raise TuningError(
            f"source {name}: its UNet takes {unet.in_channels} channels and gives {unet.out_channels}, and latents have "
            f"{latent}; a UNet that reads more than latents, such as one for inpainting, is not supported: give one for text "
            "to image, with the VAE it was trained with"
        )
