"""What a build reads: a Stable Diffusion checkpoint, with the UNet of a variant. Where sources lie is in `tuning.sources`."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

import tuning
from engines.bundle import sha256
from engines.manifest import is_variant
from exporter.errors import SourceError
from tuning.changes import changes_of
from tuning.folder import only_assembled, unet_from
from tuning.sources import MINI, check_part, find_folder

__all__ = ["MINI", "VARIANTS", "Checkpoint", "open_source"]

VARIANTS = tuple(tuning.RECIPES)
_PARTS = {"unet": True, "vae": True, "text_encoder": True, "tokenizer": False, "scheduler": False}
"""The folders of a checkpoint, and whether they hold weights."""


@dataclass(frozen=True)
class Checkpoint:
    """A Stable Diffusion checkpoint in the diffusers folder layout. Weights are read when asked for.

    ``own_unet`` is the folder of a UNet that takes the place of the checkpoint's.
    """

    name: str
    folder: Path
    own_unet: Path | None = None

    @property
    def guidance_scale(self) -> float:
        """What pictures look best with: Stable Diffusion's usual 7.5; the embedded model was measured to want less."""
        return 3.0 if self.folder == MINI else 7.5

    def unet_folder(self, variant: str) -> Path:
        """Where a variant's UNet comes from: ``unet_assembled`` where there is one, else ``unet``, which a recipe cuts down."""
        stored = self.folder / f"unet_{variant}"
        return self.own_unet or (stored if (stored / "config.json").is_file() else self.folder / "unet")

    def unet(self, variant: str) -> UNet2DConditionModel:
        """The UNet of a variant, float32, in evaluation mode; made by the recipe of that name where none is stored.

        Raises:
            SourceError: the checkpoint has no such variant and none can be made, or the UNet given for it is another.
        """
        folder = self.unet_folder(variant)
        try:
            unet = tuning.load_unet(folder)
        except tuning.TuningError as error:
            raise SourceError(f"source {self.name}: {error}") from error
        if self.own_unet is not None:
            self._check_own(unet, variant)
        if variant == "original" or folder != self.folder / "unet":
            return unet
        try:
            return tuning.assemble(unet, tuning.recipe(variant)).eval()
        except tuning.TuningError as error:
            raise SourceError(f"source {self.name} has no {variant} UNet, and none can be made of its UNet: {error}") from error

    def _check_own(self, unet: UNet2DConditionModel, variant: str) -> None:
        """Raise SourceError unless the UNet given has the units that the variant's recipe leaves of the source's."""
        if variant not in tuning.RECIPES:
            return
        recipe = tuning.recipe(variant)
        try:
            original = unet_from(self.folder / "unet" / "config.json")  # without weights
            wanted = tuning.assemble(original, recipe.model_copy(update={"experts": None}), share=True)
        except tuning.TuningError as error:
            raise SourceError(f"source {self.name} can have no {variant} UNet: {error}") from error
        ours, theirs = tuning.unit_modules(unet), tuning.unit_modules(wanted)
        unlike = sorted(ours.keys() ^ theirs.keys())
        if unlike:
            which = "lacks" if unlike[0] in theirs else "has"
            raise SourceError(f"{self.own_unet} is no {variant} UNet of {self.name}: it {which} {unlike[0]}; name its --variant")
        if list(unet.config.block_out_channels) != list(wanted.config.block_out_channels):
            raise SourceError(
                f"{self.own_unet} is no UNet of {self.name}: its widths are {list(unet.config.block_out_channels)}, "
                f"not {list(wanted.config.block_out_channels)}"
            )
        if (changes_of(unet).experts is None) != (recipe.experts is None):
            raise SourceError(f"{self.own_unet} is no {variant} UNet: only condconv has conditional convolutions")

    def is_distilled(self, variant: str) -> bool:
        """Whether the variant's weights were trained for it, not only cut out of the original's."""
        folder = self.unet_folder(variant)
        return variant == "original" or (folder != self.folder / "unet" and not only_assembled(folder))

    def vae(self) -> AutoencoderKL:
        """The VAE, float32, in evaluation mode."""
        with self._reading("vae"):
            vae = AutoencoderKL.from_pretrained(self.folder, subfolder="vae", use_safetensors=True, local_files_only=True)
        return vae.float().eval()

    def text_encoder(self) -> nn.Module:
        """The CLIP text encoder, float32, in evaluation mode."""
        from transformers import CLIPTextModel

        with self._reading("text_encoder"), _no_progress_bar():
            model: nn.Module = CLIPTextModel.from_pretrained(
                self.folder / "text_encoder", use_safetensors=True, local_files_only=True, dtype=torch.float32
            )
        return model.eval()

    @contextmanager
    def _reading(self, part: str) -> Iterator[None]:
        """Turn what diffusers and transformers raise for damaged files, of many kinds, into SourceError."""
        try:
            yield
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SourceError(
                f"source {self.name}: {self.folder / part} cannot be read ({reason}); get its files again, or save the model "
                "again with diffusers' save_pretrained"
            ) from error

    def files(self, variant: str) -> Iterator[tuple[str, Path]]:
        """Every file that a build of the variant reads, and what it is called whichever folder the checkpoint lies in."""
        unet = self.unet_folder(variant)
        for folder in (unet, *(self.folder / part for part in _PARTS if part != "unet")):
            name = "--unet" if folder == self.own_unet else folder.name
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                # Beside a UNet that was distilled may lie what its training left.
                if folder != self.own_unet or path.suffix in {".json", ".safetensors"}:
                    yield f"{name}/{path.relative_to(folder)}", path

    def fingerprint(self, variant: str) -> str:
        """A hash of all those files."""
        digest = hashlib.sha256()
        for name, path in self.files(variant):
            digest.update(f"{name} {sha256(path)}\n".encode())
        return digest.hexdigest()


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers' own bar out of the build's output."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def open_source(source: str, variant: str, unet: Path | None = None) -> Checkpoint:
    """Find a checkpoint and check that a build can read it.

    Args:
        source: ``mini``, a diffusers folder, or a hub id such as ``owner/name`` (fetched into the hub's cache).
        variant: the name of a recipe; with ``unet``, of any.
        unet: the folder of the variant's UNet, where it is not in the source's.

    Raises:
        SourceError: unknown variant or source, a pickle, or a folder with parts missing.
    """
    if unet is None and variant not in VARIANTS:
        raise SourceError(f"unknown variant {variant!r}; choose from: {', '.join(VARIANTS)}")
    if not is_variant(variant):
        raise SourceError(f"variant {variant!r} is no name; write small letters, numbers and -, such as {', '.join(VARIANTS)}")
    try:
        folder = find_folder(source)
        for part, weights in _PARTS.items():
            check_part(source, folder, part, weights=weights)
        if unet is not None:
            check_part(source, unet.parent, unet.name)
    except tuning.TuningError as error:
        raise SourceError(str(error)) from error
    return Checkpoint(source, folder, unet)
