"""Text encoder and VAE of a checkpoint, made and loaded by transformers and diffusers, which know the older names of tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuning.checkpoints.configs import Extent, check_extent, check_kinds, text_settings
from tuning.checkpoints.files import read_json
from tuning.checkpoints.weight_files import weights_named_in
from tuning.surgery.meta import on_meta

__all__ = ["LOADERS", "SKELETONS", "is_tiny"]

_TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps", "attention_dropout", "initializer_range", "initializer_factor",
    "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
"""Of a text encoder's configuration: what describes the model."""


def _vae_class(config: dict[str, Any]) -> Any:
    """The class of diffusers that a VAE's configuration is for."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    kinds = {made.__name__: made for made in (AutoencoderKL, AutoencoderTiny)}
    kind = config.get("_class_name", "AutoencoderKL")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"it is {kind!r:.60}, and {' and '.join(kinds)} are the only kinds of VAE that can be built")
    return kinds[kind]


def _vae_skeleton(folder: Path, extent: Extent | None) -> nn.Module:
    config = read_json(folder / "config.json")
    made = _vae_class(config)
    check_kinds(config, made)
    check_extent(config, extent)
    if config.get("scaling_factor", 1) <= 0:
        raise ValueError(f"its scaling_factor is {config['scaling_factor']}, and must be more than 0")
    with on_meta():
        vae: Any = made.from_config(config)
    if is_tiny(vae):
        stages = len(vae.config.encoder_block_out_channels), len(vae.config.decoder_block_out_channels)
        if stages[0] != stages[1] or vae.config.upsampling_scaling_factor != 2:
            raise ValueError(
                f"its encoder has {stages[0]} stages, its decoder {stages[1]} with upsampling by "
                f"{vae.config.upsampling_scaling_factor}; a picture must come back in its own size: as many stages, and by 2"
            )
    model: nn.Module = vae
    return model


def is_tiny(vae: Any) -> bool:
    """Whether a VAE is an AutoencoderTiny (TAESD), whose encoder gives latents, and no distribution of them."""
    return not hasattr(vae, "quant_conv")


def _text_skeleton(folder: Path, extent: Extent | None) -> nn.Module:
    from accelerate import init_empty_weights
    from transformers import CLIPTextModel

    with init_empty_weights(include_buffers=False):  # its position numbers are a buffer that no file has
        text: nn.Module = CLIPTextModel(_text_config(folder, extent))
    return text


def _text_config(folder: Path, extent: Extent | None = None) -> Any:
    """A model's configuration and the files of its weights, without the rest that a configuration may ask of transformers.

    Such as an ``attn_implementation`` from a hub, which would be fetched and run.
    """
    from transformers import CLIPTextConfig

    found = read_json(folder / "config.json")
    if (kind := found.get("model_type", "clip_text_model")) not in {"clip_text_model", "clip"}:
        raise ValueError(f"it is of the kind {kind!r:.60}, and CLIP is the only kind of text encoder that can be built")
    settings = text_settings(found)
    check_extent(settings, extent)
    if settings.get("use_attention_mask"):
        raise ValueError("it has use_attention_mask, with which padding is not read; here it always is")
    named = {} if (named := weights_named_in(folder)) is None else {"transformers_weights": named}
    return CLIPTextConfig(**{name: settings[name] for name in _TEXT_FIELDS if name in settings}, **named)


SKELETONS: dict[str, Callable[[Path, Extent | None], nn.Module]] = {"vae": _vae_skeleton, "text_encoder": _text_skeleton}


def _load_vae(folder: Path, dtype: torch.dtype, variant: str | None) -> nn.Module:
    vae, info = _vae_class(read_json(folder / "config.json")).from_pretrained(
        folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, variant=variant
    )
    return _complete(vae, info)


def _load_text_encoder(folder: Path, dtype: torch.dtype, variant: str | None) -> nn.Module:
    from transformers import CLIPTextModel

    with _no_progress_bar():
        text, info = CLIPTextModel.from_pretrained(
            folder, config=_text_config(folder), dtype=dtype, use_safetensors=True, local_files_only=True,
            output_loading_info=True, variant=variant,
        )  # fmt: skip
    return _complete(text, info)


def _complete(model: nn.Module, info: dict[str, Any]) -> nn.Module:
    """The model, unless a tensor that was missing was made up."""
    if info["missing_keys"]:
        raise ValueError(f"{sorted(info['missing_keys'])[0]} is missing")
    return model


LOADERS: dict[str, Callable[[Path, torch.dtype, str | None], nn.Module]] = {"vae": _load_vae, "text_encoder": _load_text_encoder}


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers' own bar out of our commands' output."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
