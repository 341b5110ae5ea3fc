"""LoRA files in the forms that programs write, and what each adds to the weights, worked out as it is written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FORMS = ("kohya", "old diffusers", "diffusers", "peft")
_ATTENTION = re.compile(r"\.(to_[qkv]|to_out\.0|[qkv]_proj|out_proj)$")
_OLD = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

Added = dict[str, Tensor]
"""What a LoRA adds to weights, by ``PART.NAME``."""


def save_lora(
    path: Path,
    models: Mapping[str, nn.Module],
    form: str = "kohya",
    *,
    only: str = r"attentions|self_attn|mlp",
    rank: int = 3,
    alpha: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Added:
    """Write a LoRA for the layers of models whose names have ``only`` in them.

    Args:
        path: where to.
        models: of the parts ``unet`` and ``text_encoder``, or of one.
        form: one of ``FORMS``; the old one is for attentions alone.
        only: an expression that is searched for in the layers' names.
        rank: of each layer.
        alpha: of each layer; without it a product is added as it is.
        seed: of the numbers.
        dtype: of the file's tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    added: Added = {}
    for part, model in models.items():
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d) or not re.search(only, name):
                continue
            if form == "old diffusers" and not _ATTENTION.search(name):
                continue
            weight = module.weight
            down = (torch.randn(rank, *weight.shape[1:], generator=generator) / weight[0].numel() ** 0.5).to(dtype)
            up = (torch.randn(len(weight), rank, *(1 for _ in weight.shape[2:]), generator=generator) / rank).to(dtype)
            stem, ups, downs = _names(form, part, name)
            tensors |= {f"{stem}{ups}.weight": up, f"{stem}{downs}.weight": down}
            if alpha is not None and form == "kohya":
                tensors[f"{stem}.alpha"] = torch.tensor(alpha)
            product = torch.einsum("or,ri->oi", up.float().flatten(1), down.float().flatten(1)).view_as(weight)
            added[f"{part}.{name}.weight"] = product * (1.0 if alpha is None else alpha / rank)
    has_header = form != "kohya" and alpha is not None
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(_settings(added, rank, alpha))} if has_header else None)
    return added


def _settings(added: Added, rank: int, alpha: float | None) -> dict[str, Any]:
    """peft's, for each part."""
    settings: dict[str, Any] = {}
    for part in {name.partition(".")[0] for name in added}:
        layers = [name.removeprefix(f"{part}.").removesuffix(".weight") for name in added if name.startswith(part)]
        settings |= {f"{part}.r": rank, f"{part}.lora_alpha": alpha, f"{part}.target_modules": layers}
    return settings


def _names(form: str, part: str, name: str) -> tuple[str, str, str]:
    """The stem of a layer's names in a file, and what follows it in the names of up and down."""
    if part == "text_encoder":
        name = f"text_model.{name.removeprefix('text_model.')}"
    if form == "kohya":
        return f"lora_{'te' if part == 'text_encoder' else 'unet'}_{name.replace('.', '_')}", ".lora_up", ".lora_down"
    if form == "peft":
        return f"{part}.{name}", ".lora_B", ".lora_A"
    if form == "diffusers":
        kind = ".lora_linear_layer" if part == "text_encoder" else ".lora"
        return f"{part}.{name}", f"{kind}.up", f"{kind}.down"
    owner, _, last = name.removesuffix(".0").rpartition(".")
    last = f"{_OLD.get(last, last)}_lora"
    return f"{part}.{owner}.{'' if part == 'text_encoder' else 'processor.'}{last}", ".up", ".down"


def add(models: Mapping[str, Any], added: Added, scale: float = 1.0) -> None:
    """Add to the weights of models, in place."""
    with torch.no_grad():
        for name, change in added.items():
            part, _, inside = name.partition(".")
            models[part].get_parameter(inside).add_(change, alpha=scale)
