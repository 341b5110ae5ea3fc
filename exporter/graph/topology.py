"""The dataflow graph of a diffusers UNet: units, and the features they read.

Derived from the modules of any UNet2DConditionModel of the SD 1.x/2.x family, whatever its widths, layers per block, missing
mid block or missing stage. Skip connections are a stack, as in the model: the stem and every layer and sampler on the way down
push, every layer on the way up pops.
"""

from typing import TYPE_CHECKING

from engines.bundle.manifest import Unit
from engines.bundle.names import BRANCH, SAMPLE, STEM, TEXT, TIME, TIMESTEP
from exporter.errors import SourceError
from exporter.graph.attention_parts import part_units
from exporter.graph.unit_modules import kind_of
from tuning.surgery.units import unit_modules

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["block_of", "check_family", "depth_factor", "topology"]

_CONDITION = {"resnet": TIME, "attention": TEXT}
"""Units with a residual branch, and what the branch reads beside the unit's input."""

_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D"}
_UNSUPPORTED = ("class_embed_type", "addition_embed_type", "encoder_hid_dim", "time_cond_proj_dim", "center_input_sample",
                "num_class_embeds", "dual_cross_attention", "time_embedding_act_fn", "resnet_skip_time_act")  # fmt: skip


def check_family(unet: "UNet2DConditionModel") -> None:
    """Raise SourceError unless the UNet is of the SD 1.x/2.x family; the message names what is not."""
    for field in _UNSUPPORTED:
        if unet.config.get(field):
            raise SourceError(
                f"UNet configuration has {field} = {unet.config[field]!r}: "
                "not of the Stable Diffusion 1.x/2.x family, the only one supported"
            )
    if (
        unet.config.resnet_time_scale_shift != "default"
        or unet.config.resnet_out_scale_factor != 1
        or unet.config.mid_block_scale_factor != 1
    ):
        raise SourceError("UNet configuration scales its ResNets unlike the Stable Diffusion 1.x/2.x family")
    blocks = [*unet.down_blocks, *unet.up_blocks] + ([unet.mid_block] if unet.mid_block is not None else [])
    for block in blocks:
        if type(block).__name__ not in _BLOCKS:
            raise SourceError(f"UNet has a {type(block).__name__}; supported blocks: {', '.join(sorted(_BLOCKS))}")


def topology(unet: "UNet2DConditionModel", in_parts: bool = False) -> tuple[Unit, ...]:
    """The units of a UNet in an order in which they can run.

    Args:
        unet: of the Stable Diffusion 1.x/2.x family.
        in_parts: whether self- and cross-attention are units of their own.

    Raises:
        SourceError: the UNet is of another family, or its skip connections do not match.
    """
    check_family(unet)
    units = [Unit(name=TIME, kind=TIME, inputs=(TIMESTEP,))]
    skips: list[str] = []
    x = SAMPLE
    for name in unit_modules(unet):
        block, kind = name.split(".")[0], kind_of(name)
        inputs: tuple[str, ...] = (x,)
        if kind == "resnet" and block == "up":
            if not skips:
                raise SourceError(f"UNet unit {name} has no skip connection left to read: more layers up than down")
            inputs = (x, skips.pop())
        if kind in _CONDITION:
            branch = f"{name}{BRANCH}"
            if in_parts and kind == "attention":
                units += part_units(name, x)
            else:
                units.append(Unit(name=branch, kind=f"{kind} branch", inputs=(*inputs, _CONDITION[kind])))
            inputs = (*inputs, branch)
        units.append(Unit(name=name, kind=kind, inputs=inputs))
        x = name
        if block == STEM or (block == "down" and kind != "attention"):
            skips.append(name)
        elif block == "down":
            skips[-1] = name
    if skips:
        raise SourceError(f"UNet leaves skip connections unread: {', '.join(skips)}: fewer layers up than down")
    return tuple(units)


def block_of(unit: str) -> str:
    """The block a unit belongs to: ``down.0`` for ``down.0.layer.1.resnet``; the time embedding goes with the stem."""
    parts = unit.split(".")
    if unit == TIME:
        return STEM
    return ".".join(parts[:2]) if parts[0] in {"down", "up"} else parts[0]


def depth_factor(unet: "UNet2DConditionModel") -> int:
    """The multiple that latent height and width must be of: 2 to the number of downsamplers."""
    samplers = sum(name.startswith("down.") and name.endswith(".sampler") for name in unit_modules(unet))
    return 1 << samplers
