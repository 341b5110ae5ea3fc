"""A source with LoRAs in its UNet and text encoder, and with another VAE, for commands that teach, measure and assemble."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from tuning.checkpoints.find_source import UNetSource, find_source, open_unet
from tuning.checkpoints.source import Source
from tuning.checkpoints.vae import Vae, find_vae
from tuning.checkpoints.weights import LoadedWeights, Weights, materialize, shapes_of
from tuning.loras.fused_weights import fused
from tuning.loras.layers import LoraFile, read_lora
from tuning.loras.lora import Lora

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["find_changed_source", "open_changed_unet"]


@dataclass(frozen=True)
class _ChangedSource(Source):
    """``plain`` with ``loras`` fused, in that order, and with ``vae`` instead of its own."""

    plain: Source
    loras: tuple[Lora, ...] = ()
    vae: Vae | None = None

    @cached_property
    def _files(self) -> list[LoraFile]:
        unet: Any = self.plain.skeleton("unet") if self.loras else None
        return [read_lora(lora, unet.config) for lora in self.loras]

    def skeleton(self, part: str) -> nn.Module:
        """As any source's."""
        return self.vae.skeleton() if part == "vae" and self.vae is not None else self.plain.skeleton(part)

    def weights(self, part: str, skeleton: nn.Module | None = None) -> Weights:
        """As any source's. Raises TuningError also where a LoRA does not fit them."""
        if part == "vae":
            return self.plain.weights(part, skeleton) if self.vae is None else self.vae.weights()
        return fused(self.plain.weights(part, skeleton), self._files, part)

    def files(self, part: str) -> Iterator[Path]:
        """As any source's, and the LoRAs."""
        if part == "vae" and self.vae is not None:
            yield from self.vae.files()
            return
        yield from self.plain.files(part)
        if part in ("unet", "text_encoder"):
            yield from (lora.path for lora in self.loras)

    def scheduler_changes(self) -> dict[str, Any]:
        """The plain source's."""
        return self.plain.scheduler_changes()

    def check_fit(self) -> None:
        """As any source's, with the VAE that it has here."""
        if self.vae is None:
            super().check_fit()
        else:
            self._check_fit({part: self.skeleton(part) for part in ("unet", "text_encoder", "vae")})

    def _check_fit(self, skeletons: Mapping[str, Any]) -> None:
        if self.vae is not None:
            self.vae.check_fit(skeletons["unet"].config, self.folder / "vae")
        super()._check_fit(skeletons)


@dataclass(frozen=True)
class _FusedUNet(UNetSource):
    """A UNet's folder, or a random UNet, with ``loras`` fused; it has no text encoder for what they have for that."""

    loras: tuple[Lora, ...] = ()

    def unet(self) -> "UNet2DConditionModel":
        """As any source's. Raises TuningError also where a LoRA does not fit it."""
        plain = super().unet()
        weights = LoadedWeights(self.name, shapes_of(plain), plain.to)
        return materialize(plain, fused(weights, [read_lora(lora, plain.config) for lora in self.loras], "unet"))


def find_changed_source(source: str, variant: str | None = None, loras: Sequence[Lora] = (), vae: str | None = None) -> Source:
    """Find a whole checkpoint, with LoRAs fused and another VAE where these are given.

    Args:
        source: as ``find_source`` takes it.
        variant: of its weight files, as ``find_source`` takes it.
        loras: in the order in which they are fused.
        vae: as ``find_vae`` takes it; then the source needs none.

    Raises:
        TuningError: one of them cannot be found or read.
    """
    for lora in loras:
        lora.check()
    found = find_source(source, variant=variant, vae=vae is None)
    if not loras and vae is None:
        return found
    own_vae = None if vae is None else find_vae(vae, found.folder / "vae")
    return _ChangedSource(found.name, found.folder, found, tuple(loras), own_vae)


def open_changed_unet(source: str, variant: str | None = None, loras: Sequence[Lora] = ()) -> UNetSource:
    """Find a UNet as ``open_unet`` does, with LoRAs fused. Raises TuningError as that, and where a LoRA cannot be read."""
    for lora in loras:
        lora.check()
    found = open_unet(source, variant)
    if not loras:
        return found
    if (whole := found.whole) is not None:
        return replace(found, whole=_ChangedSource(whole.name, whole.folder, whole, tuple(loras)))
    return _FusedUNet(found.name, found.folder, None, found.variant, tuple(loras))
