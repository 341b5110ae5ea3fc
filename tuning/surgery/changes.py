"""Changes that assembly makes to a UNet and no diffusers configuration can say, kept in the configuration under a key of our own.

diffusers ignores the key, so such a UNet is loaded with `tuning.load_unet`; all others with
`UNet2DConditionModel.from_pretrained` as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from engines.support.records import Record
from tuning.surgery.condconv import CondConvResnet, Router
from tuning.surgery.units import Removed, unit_modules

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["KEY", "Changes", "PlacedExperts", "apply_changes", "changes_of"]

KEY = "unet_heirloom"


class PlacedExperts(Record):
    """The ResNets whose two 3 x 3 convolutions are conditional, how many kernels each mixes, and what the router reads."""

    resnets: tuple[str, ...] = Field(min_length=1)
    count: int = Field(4, ge=2)
    router: Router = "timestep"


class Changes(Record):
    """Attentions that were taken out of their layers, and conditional convolutions; names are the changed UNet's units."""

    version: Literal[1] = 1
    removed: tuple[str, ...] = ()
    experts: PlacedExperts | None = None

    def __bool__(self) -> bool:
        return bool(self.removed or self.experts)


class _NoAttention(Removed):
    """Stands where a transformer was and hands its input on."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        return (hidden_states,)


def changes_of(unet: UNet2DConditionModel) -> Changes:
    """The changes that were made to this UNet beside its configuration."""
    return Changes.model_validate(unet.config.get(KEY) or {})


def apply_changes(unet: UNet2DConditionModel, changes: Changes) -> None:
    """Makes those changes that are not made yet, in place, and notes them in the UNet's configuration.

    Routers start at zero, the weights of other experts than the first are random.

    Assembly calls this on the meta device and fills in the weights after: new modules keep all they have in their state.
    """
    if not changes:
        return
    units, before = unit_modules(unet), changes_of(unet)
    for name in sorted(set(changes.removed) - set(before.removed)):
        _replace(unet, units[name], _NoAttention())
    if changes.experts is not None and before.experts is None:
        _add_experts(unet, units, changes.experts)
    unet.register_to_config(**{KEY: changes.model_dump(mode="json")})


def _add_experts(unet: nn.Module, units: dict[str, str], experts: PlacedExperts) -> None:
    for name in experts.resnets:
        if not name.endswith(".resnet"):
            raise ValueError(f"experts are placed in {name}, which is no ResNet")
        module = CondConvResnet(unet.get_submodule(units[name]), experts.count, experts.router)
        _replace(unet, units[name], module)


def _replace(unet: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(unet.get_submodule(owner), name, module)
