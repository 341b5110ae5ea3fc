"""The layout of CompVis' code, for writing: a diffusers checkpoint's weights under the names of a single file.

`single_file` reads that layout with diffusers' converters; here the names are written out, so that the two check each other. It
needs them where a file has a UNet's names without their dots.

The names are those of the modules in https://github.com/CompVis/stable-diffusion (ldm/modules), and of open_clip for the second
kind of text encoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["clip_state", "open_clip_state", "single_file_state", "unet_state", "vae_state"]

State = dict[str, Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_state(unet: Any) -> State:
    """A UNet's weights under CompVis' names: the blocks of each way are numbered through, samplers among them."""
    layers = unet.config.layers_per_block
    return {f"model.diffusion_model.{_unet_name(name, unet, layers)}": w for name, w in unet.state_dict().items()}


def _unet_name(name: str, unet: Any, layers: int) -> str:
    owner, _, kind = name.rpartition(".")
    if owner in _UNET_ENDS:
        return f"{_UNET_ENDS[owner]}.{kind}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        number = 2 * int(found[2]) + (found[1] == "attentions")
        return f"middle_block.{number}.{_inside(found[1], found[3])}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name)
    assert found is not None, name
    way, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        after = 2 if hasattr(unet.up_blocks[block], "attentions") else 1
        return f"output_blocks.{(block + 1) * (layers + 1) - 1}.{after}.{rest}"
    number = block * (layers + 1) + layer
    place = f"input_blocks.{number + 1}" if way == "down" else f"output_blocks.{number}"
    return f"{place}.{int(kind == 'attentions')}.{_inside(kind, rest)}"


def _inside(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    module, _, what = rest.partition(".")
    return f"{_RESNET[module]}.{what}"


def vae_state(vae: Any) -> State:
    """A VAE's weights under CompVis' names: the way up is numbered from the outside, attentions are 1x1 convolutions."""
    last = len(vae.config.block_out_channels) - 1
    state: State = {}
    for name, weight in vae.state_dict().items():
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{last - int(found[1])}", name).replace("down_blocks.", "down.")
        name = re.sub(r"(down|up)samplers\.0", r"\1sample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        name = name.replace(".resnets.", ".block.")
        if found := re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.*)\.(weight|bias)", name):
            name = f"{found[1]}mid.attn_1.{_VAE_ATTENTION[found[2]]}.{found[3]}"
            if weight.ndim == 2:
                weight = weight[:, :, None, None]
        state[f"first_stage_model.{name}"] = weight
    return state


def clip_state(text: nn.Module) -> State:
    """The text encoder of Stable Diffusion 1.x: OpenAI's CLIP as transformers once called its weights, and its positions."""
    state = {f"cond_stage_model.transformer.text_model.{_bare(name)}": w for name, w in text.state_dict().items()}
    length = state["cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"].shape[0]
    return state | {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(length)[None]}


def open_clip_state(text: nn.Module) -> State:
    """The text encoder of Stable Diffusion 2.x, as open_clip calls its weights: query, key and value are one tensor."""
    ours = {_bare(name): weight for name, weight in text.state_dict().items()}
    state = {
        "positional_embedding": ours.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": ours.pop("embeddings.token_embedding.weight"),
        "ln_final.weight": ours.pop("final_layer_norm.weight"),
        "ln_final.bias": ours.pop("final_layer_norm.bias"),
    }
    state["text_projection"] = torch.zeros_like(state["positional_embedding"][0]).diag()
    for name, weight in ours.items():
        found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name)
        assert found is not None, name
        place, module, kind = f"transformer.resblocks.{found[1]}", found[2], found[3]
        if module == "self_attn.q_proj":
            three = [ours[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            state[f"{place}.attn.in_proj_{kind}"] = torch.cat(three)
        elif module in _OPEN_CLIP:
            state[f"{place}.{_OPEN_CLIP[module]}.{kind}"] = weight
    return {f"cond_stage_model.model.{name}": weight for name, weight in state.items()}


def _bare(name: str) -> str:
    return name.removeprefix("text_model.")


def single_file_state(parts: Mapping[str, Any], *, open_clip: bool = False) -> State:
    """Everything that a checkpoint's one file holds, from its unet, vae and text_encoder; some have a few tensors more."""
    text = open_clip_state if open_clip else clip_state
    return unet_state(parts["unet"]) | vae_state(parts["vae"]) | text(parts["text_encoder"])
