"""Conditional convolutions computed by hand: for each sample alone, kernels summed one by one, then an ordinary convolution.

A whole UNet by hand is the assembled twin, diffusers' own modules, run on one sample at a time: before each convolution its
kernel is replaced by what the formula gives. None of this shares code with
`tuning.surgery.condconv` or `exporter.graph.condconv`.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

from tuning.surgery.changes import changes_of
from tuning.surgery.condconv import CondConv2d
from tuning.surgery.units import unit_modules


def randomise_routers(unet: torch.nn.Module, scale: float = 1.0) -> None:
    """Routers of all conditional convolutions get random weights, so that gates differ between samples and timesteps."""
    generator = torch.Generator().manual_seed(3)
    for module in unet.modules():
        if isinstance(module, CondConv2d):
            for parameter in module.router.parameters():
                parameter.data = scale * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def kernel_by_hand(convolution: CondConv2d, condition: Tensor) -> Tensor:
    """The kernel of one sample, whose router reads `condition` (width,)."""
    kernel = torch.zeros_like(convolution.kernels[0])
    for number, expert in enumerate(convolution.kernels):
        score = float(convolution.router.weight[number] @ condition + convolution.router.bias[number])
        kernel = kernel + (2 / (1 + math.exp(-score)) - (number > 0)) * expert
    return kernel


@torch.no_grad()
def convolution_by_hand(convolution: CondConv2d, x: Tensor, time: Tensor) -> Tensor:
    """(n, in, h, w) and the activated time embedding (n, width) -> (n, out, h, w)."""
    rows = []
    for sample, embedded in zip(x, time, strict=True):
        condition = sample.mean((1, 2)) if convolution.reads == "features" else embedded
        rows.append(functional.conv2d(sample[None], kernel_by_hand(convolution, condition), convolution.bias, padding=1))
    return torch.cat(rows)


def twin(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same UNet with diffusers' own ResNets, whose kernels are the first experts."""
    config = {key: value for key, value in unet.config.items() if key not in {"unet_heirloom", "_use_default_values"}}
    plain: UNet2DConditionModel = UNet2DConditionModel.from_config(config).eval()
    state = {key.replace(".kernels.0", ".weight"): value for key, value in unet.state_dict().items()}
    plain.load_state_dict({key: value for key, value in state.items() if ".kernels." not in key and ".router." not in key})
    return plain


@torch.no_grad()
def unet_by_hand(unet: UNet2DConditionModel, sample: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """The prediction of a UNet with conditional convolutions; shapes as the UNet's, one timestep per row."""
    plain, embedded = copy.deepcopy(twin(unet)), []
    plain.time_embedding.register_forward_hook(lambda module, args, output: embedded.append(functional.silu(output[0])))
    experts = changes_of(unet).experts
    assert experts is not None
    paths = [f"{unit_modules(unet)[name]}.{part}" for name in experts.resnets for part in ("conv1", "conv2")]
    for path in paths:
        conditional = unet.get_submodule(path)
        assert isinstance(conditional, CondConv2d)
        plain.get_submodule(path).register_forward_pre_hook(_replace_kernel(conditional, embedded))
    rows = zip(sample.split(1), timesteps, text.split(1), strict=True)
    return torch.cat([plain(latents, timestep, states).sample for latents, timestep, states in rows])


def _replace_kernel(conditional: CondConv2d, embedded: list[Tensor]) -> Any:
    def hook(module: torch.nn.Conv2d, inputs: tuple[Tensor]) -> None:
        condition = inputs[0][0].mean((1, 2)) if conditional.reads == "features" else embedded[-1]
        module.weight.data = kernel_by_hand(conditional, condition)

    return hook
