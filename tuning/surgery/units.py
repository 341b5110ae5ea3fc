"""Names of a UNet's units and the modules they stand for, read from the model itself.

A unit is one ResNet, one transformer or one sampler; `stem` is the first convolution and `head` the last one. Nothing
here is a table: widths, layers per block, a missing mid block or a missing stage all show in the modules.
"""

from torch import nn

from engines.bundle.names import ATTENTION, NOISE, STEM

__all__ = ["Removed", "unit_modules"]


class Removed(nn.Module):
    """Stands where assembly took a unit out of its layer: no unit any more."""


def _block_units(name: str, path: str, block: nn.Module) -> dict[str, str]:
    """Units of one block in the order in which they run: ResNet, its transformer, ..., the sampler."""
    units: dict[str, str] = {}
    attentions = getattr(block, "attentions", None) or []
    for i, _ in enumerate(block.resnets):  # type: ignore[arg-type]
        units[f"{name}.layer.{i}.resnet"] = f"{path}.resnets.{i}"
        if i < len(attentions) and not isinstance(attentions[i], Removed):
            units[f"{name}.layer.{i}{ATTENTION}"] = f"{path}.attentions.{i}"
    for kind in ("downsamplers", "upsamplers"):
        if getattr(block, kind, None):
            units[f"{name}.sampler"] = f"{path}.{kind}.0"
    return units


def unit_modules(unet: nn.Module) -> dict[str, str]:
    """Maps every unit of a diffusers UNet2DConditionModel to its module's dotted path, in data-flow order.

    The mid block starts with a ResNet of its own: its layer 0 is resnets[0] and attentions[0], which run in that order
    there, and layer 1 is resnets[1]. `head` names conv_out; the norm before it (conv_norm_out) belongs to it.
    """
    units = {STEM: "conv_in"}
    for i, block in enumerate(unet.down_blocks):  # type: ignore[arg-type]
        units |= _block_units(f"down.{i}", f"down_blocks.{i}", block)
    mid = getattr(unet, "mid_block", None)
    if mid is not None:
        units |= _block_units("mid", "mid_block", mid)
    for i, block in enumerate(unet.up_blocks):  # type: ignore[arg-type]
        units |= _block_units(f"up.{i}", f"up_blocks.{i}", block)
    return units | {NOISE: "conv_out"}
