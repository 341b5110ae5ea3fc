"""A build's input: a Stable Diffusion checkpoint, with the UNet of a variant (see `tuning.checkpoints.find_source`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

import tuning
from engines.bundle.folder import sha256
from engines.bundle.manifest import is_variant
from engines.support.spelling import did_you_mean
from exporter.errors import SourceError
from tuning.checkpoints.configs import check_fit
from tuning.checkpoints.files import CONFIGURATIONS
from tuning.checkpoints.find_source import EMBEDDED, find_source
from tuning.checkpoints.folder import extent_of, meta_unet, only_assembled, unet_files, unet_weights
from tuning.checkpoints.source import PARTS, FolderSource, RandomSource, Source, check_part
from tuning.checkpoints.vae import Vae, find_vae
from tuning.checkpoints.weights import ComputedWeights, RenamedWeights, Weights, materialize, shapes_of
from tuning.loras.fused_weights import fused
from tuning.loras.layers import LoraFile, fitted, read_lora
from tuning.loras.lora import Lora
from tuning.loras.note import not_fused_before
from tuning.surgery.assembly import origins
from tuning.surgery.changes import changes_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel

__all__ = ["MODELS", "VARIANTS", "Checkpoint", "open_source"]

MODELS = ("unet", "text_encoder", "vae")
"""The parts of a checkpoint that segments are made of."""

VARIANTS = tuple(tuning.RECIPES)
_LORAS = "loras"
_EVERYTHING = frozenset({*PARTS, _LORAS})
"""The parts of a checkpoint that a build reads, and what is fused into them."""


@dataclass(frozen=True)
class Checkpoint:
    """A Stable Diffusion checkpoint with one UNet for each variant. Weights are read when they are taken.

    ``own_unet`` is the folder of a UNet that replaces the checkpoint's; ``own_recipe`` a .json file by which a variant is made
    that no recipe of ours makes. ``loras`` are fused into the weights of UNet and text encoder, before a recipe makes a smaller
    UNet of them. ``own_vae`` replaces the source's. Parts are ``unet``, ``vae``, ``text_encoder``.
    """

    source: Source
    own_unet: Path | None = None
    own_recipe: Path | None = None
    loras: tuple[Lora, ...] = ()
    own_vae: Vae | None = None
    _weights: dict[tuple[str, str], Weights] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The source as the user named it."""
        return self.source.name

    @property
    def folder(self) -> Path:
        """Where its configurations, tokenizer and scheduler lie."""
        return self.source.folder

    @property
    def guidance_scale(self) -> float:
        """The default guidance scale: Stable Diffusion's usual 7.5; the embedded models were measured to want less."""
        return 3.0 if self.folder in EMBEDDED.values() else 7.5

    def skeleton(self, part: str, variant: str) -> Any:
        """A part's module without weights: parameters on the meta device, in evaluation mode.

        Raises:
            SourceError: a configuration is missing or no such model's, the source has no such variant and none can be made of
                its UNet, or the UNet given for it is another.
        """
        with _source_errors(self.name):
            if part == "vae" and self.own_vae is not None:
                return self.own_vae.skeleton()
            if part != "unet":
                return self.source.skeleton(part)
            if (folder := self._unet_folder(variant)) is None:
                return self._original() if self._is_plain(variant) else self._assembled(variant)
            unet = meta_unet(folder / "config.json", extent_of(folder))
        if self.own_unet is not None:
            self._check_own(unet, variant)
        return unet

    def weights(self, part: str, variant: str) -> Weights:
        """Where the part's weights are, under the names that they have in its skeleton's state.

        Raises:
            SourceError: as ``skeleton``, or the weights are missing or not those that the configuration needs, or a LoRA is none
                for them.
        """
        if (part, variant) not in self._weights:
            with _source_errors(self.name):
                self._weights[part, variant] = self._unet_weights(variant) if part == "unet" else self._own_weights(part)
        return self._weights[part, variant]

    def _own_weights(self, part: str, skeleton: nn.Module | None = None) -> Weights:
        """The source's, with the LoRAs fused; ``skeleton`` is the source's of the part, where it has been made already."""
        if part == "vae":
            return self.source.weights(part, skeleton) if self.own_vae is None else self.own_vae.weights()
        return fused(self.source.weights(part, skeleton), self._lora_files, part)

    @cached_property
    def _lora_files(self) -> list[LoraFile]:
        unet = self._original().config if self.loras else None
        return [read_lora(lora, unet) for lora in self.loras]

    def unet(self, variant: str) -> UNet2DConditionModel:
        """The whole UNet of a variant, float32, in evaluation mode. Raises SourceError as ``weights`` does."""
        return self._whole("unet", variant)

    def vae(self) -> AutoencoderKL:
        """The VAE, float32, in evaluation mode."""
        return self._whole("vae", "original")

    def text_encoder(self) -> nn.Module:
        """The CLIP text encoder, float32, in evaluation mode."""
        text: nn.Module = self._whole("text_encoder", "original")
        return text

    def _whole(self, part: str, variant: str) -> Any:
        with _source_errors(self.name):
            return materialize(self.skeleton(part, variant), self.weights(part, variant))

    def _unet_folder(self, variant: str) -> Path | None:
        """The folder of a variant's own UNet; None where it is the source's UNet, or is cut out of that."""
        if self.own_unet is not None:
            return self.own_unet
        if self.own_recipe is not None:
            return None
        stored = self.folder / f"unet_{variant}"
        return stored if isinstance(self.source, FolderSource) and (stored / "config.json").is_file() else None

    def _original(self) -> UNet2DConditionModel:
        """The skeleton of the source's UNet."""
        return self.source.skeleton("unet")

    def _assembled(self, variant: str) -> UNet2DConditionModel:
        """The skeleton of what the recipe of that name makes of the source's UNet."""
        with self._making(variant):
            return tuning.assemble(self._original(), self._recipe(variant))

    def _is_plain(self, variant: str) -> bool:
        """Whether the variant is the source's UNet as it is, made by no recipe."""
        return variant == "original" and self.own_recipe is None

    def _recipe(self, variant: str) -> tuning.Recipe:
        return tuning.recipe(str(self.own_recipe) if self.own_recipe else variant)

    def _unet_weights(self, variant: str) -> Weights:
        unet = self.skeleton("unet", variant)
        if (folder := self._unet_folder(variant)) is not None:
            own, files = unet_weights(folder, unet), not_fused_before(self._lora_files, folder)
            if not any(file.layers["unet"] for file in files):
                return own
            return fused(own, files, "unet", shapes_of(self._original()), self._origins(variant))
        if self._is_plain(variant):
            return self._own_weights("unet", unet)
        original, recipe = self._original(), self._recipe(variant)
        whole = self._own_weights("unet", original)
        if recipe.experts is None:
            return RenamedWeights(whole, origins(original, recipe))
        # What experts start from comes from several kernels of the original, or from none.
        return ComputedWeights(
            f"{self.name}, {variant}",
            shapes_of(unet),
            lambda: tuning.assemble(materialize(self._original(), whole), recipe),
            whole,
        )

    def notes(self, variant: str) -> Iterator[str]:
        """Remarks on how the weights were made, for a person to read. Raises SourceError as ``weights`` does."""
        yield from self.source.notes()
        if self.own_vae is not None and (note := self.own_vae.note(self.folder / "vae")):
            yield note
        if (folder := self._unet_folder(variant)) is None:
            return
        for file in not_fused_before(self._lora_files, folder):
            if layers := fitted(file, "unet", shapes_of(self._original())):
                own, names = self.weights("unet", variant).shapes, self._origins(variant)
                if left := len(layers.keys() - {origin for name, origin in names.items() if name in own}):
                    yield (
                        f"LoRA {file.lora.path}: {left} of its {len(layers)} unet layers are of layers that the {variant} UNet "
                        "does not have, and are left out"
                    )

    def _origins(self, variant: str) -> dict[str, str]:
        """Names of the weights of a variant's own UNet -> the source's, as the recipe of that name has them.

        Raises:
            SourceError: there is no such recipe.
        """
        if variant not in tuning.RECIPES:
            raise SourceError(
                f"LoRA {self.loras[0].path}: no recipe of ours is called {variant}, so nothing says which layers of "
                f"{self.own_unet} are which of the source's; fuse the LoRA into the source and distil then, or leave --lora out"
            )
        with self._making(variant):
            return origins(self._original(), tuning.recipe(variant).model_copy(update={"experts": None}))

    @contextmanager
    def _making(self, variant: str) -> Iterator[None]:
        try:
            yield
        except tuning.TuningError as error:
            raise SourceError(f"source {self.name} has no {variant} UNet, and none can be made of its UNet: {error}") from error

    def _check_own(self, unet: UNet2DConditionModel, variant: str) -> None:
        """Raise SourceError unless the UNet given has the units that the variant's recipe leaves of the source's."""
        if variant not in tuning.RECIPES:
            return
        recipe = tuning.recipe(variant)
        try:
            wanted = tuning.assemble(self._original(), recipe.model_copy(update={"experts": None}))
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
                f"not {list(wanted.config.block_out_channels)}; give the --source that it was made from"
            )
        if (changes_of(unet).experts is None) != (recipe.experts is None):
            raise SourceError(
                f"{self.own_unet} is no {variant} UNet: only condconv has conditional convolutions; name its --variant"
            )

    def is_distilled(self, variant: str) -> bool:
        """Whether the variant's weights were trained for it, not only cut out of the original's."""
        folder = self._unet_folder(variant)
        return self._is_plain(variant) or (folder is not None and not only_assembled(folder))

    def files(self, variant: str, parts: Container[str] = _EVERYTHING) -> Iterator[tuple[str, Path]]:
        """The files of parts that a build reads, and what each is called whichever folder the checkpoint lies in."""
        folder = self._unet_folder(variant)
        if self.own_recipe is not None and "unet" in parts:
            yield "recipe.json", self.own_recipe
        if folder is not None and "unet" in parts:
            name = "--unet" if folder == self.own_unet else folder.name
            for path in sorted(unet_files(folder)):
                yield f"{name}/{path.name}", path
        for part in PARTS:
            replaced = part == "unet" and folder is not None and isinstance(self.source, FolderSource)
            if part == "vae" and part in parts and self.own_vae is not None:
                yield from ((f"--vae/{path.name}", path) for path in self.own_vae.files())
            elif part in parts and not replaced:
                yield from ((f"{part}/{path.name}", path) for path in self.source.files(part))
        if _LORAS in parts:
            for number, lora in enumerate(self.loras):
                yield f"{_LORAS}/{number} at {lora.scale!r}", lora.path

    def settings(self) -> dict[str, bytes]:
        """The files of tokenizer and scheduler that a bundle gets: those that their libraries read, and a licence.

        What else lies beside them, a stranger's link to a file of this machine among it, is not for whoever gets the bundle.
        """
        found: dict[str, bytes] = {}
        for part in ("tokenizer", "scheduler"):
            for path in sorted((self.folder / part).iterdir()):
                known = path.name in CONFIGURATIONS or (path.name == "LICENSE" and not path.is_symlink())
                if known and path.is_file():
                    found[f"{part}/{path.name}"] = path.read_bytes()
        if self.source.scheduler_changes():
            config = json.dumps(self.source.scheduler_config(), indent=2, sort_keys=True)
            found["scheduler/scheduler_config.json"] = f"{config}\n".encode()
        return found

    def check_fit(self, unet: Any, vae: Any, text: Any) -> None:
        """Raise SourceError unless the configurations of UNet, VAE and text encoder fit together."""
        with _source_errors(self.name):
            if self.own_vae is not None:
                self.own_vae.check_fit(unet, self.folder / "vae")
            check_fit(self.name, unet, vae, text)

    def text_length(self, text: Any) -> int:
        """Tokens of a prompt, given the text encoder's configuration. Raises SourceError where the tokenizer is not for it."""
        with _source_errors(self.name):
            length: int = self.source.tokenizer(text).model_max_length
            return length

    def check_weights(self, variant: str) -> None:
        """Raise SourceError if weights are missing, cut off or not those of their configurations, before one is needed."""
        for part in MODELS:
            self.weights(part, variant)

    def fingerprint(self, variant: str, digest: Callable[[Path], str] = sha256, parts: Container[str] = _EVERYTHING) -> str:
        """A hash of the files of parts, whose own are given by ``digest``; of a random source's name and seed as well.

        Of single parts it is a hash of what LoRAs are fused into.
        """
        whole = hashlib.sha256()
        if isinstance(self.source, RandomSource):
            whole.update(f"{self.name} {self.source.seed}\n".encode())
        for name, path in self.files(variant, parts):
            whole.update(f"{name} {digest(path)}\n".encode())
        return whole.hexdigest()


@contextmanager
def _source_errors(name: str) -> Iterator[None]:
    """Say of which source TuningError speaks."""
    try:
        yield
    except tuning.TuningError as error:
        reason = str(error)
        told = reason.startswith(("source ", "unknown source ", "LoRA ", "VAE "))
        raise SourceError(reason if told else f"source {name}: {reason}") from error


def open_source(
    source: str,
    variant: str,
    unet: Path | None = None,
    config: Path | None = None,
    variant_files: str | None = None,
    recipe: Path | None = None,
    loras: Sequence[Lora] = (),
    vae: str | None = None,
) -> Checkpoint:
    """Find a checkpoint and check that a build can read it.

    Args:
        source: as ``tuning.checkpoints.find_source.find_source`` takes it.
        variant: the name of a recipe; with ``unet``, of any.
        unet: the folder of the variant's UNet, where it is not in the source's.
        config: a diffusers folder with configurations, for a single file of another family.
        variant_files: of the weight files of a folder, such as ``fp16``.
        recipe: a .json file by which the variant is made, where it is none of ours.
        loras: what is fused into UNet and text encoder.
        vae: what replaces the source's, as ``tuning.checkpoints.vae.find_vae`` takes it.

    Raises:
        SourceError: unknown variant or source, a pickle, or a folder or file with parts missing.
    """
    if unet is None and recipe is None and variant not in VARIANTS:
        raise SourceError(
            f"unknown variant {variant!r:.60}; {did_you_mean(variant, VARIANTS)}choose from: {', '.join(VARIANTS)}, "
            "or the .json file of a recipe"
        )
    if unet is not None and recipe is not None:
        raise SourceError(f"recipe {recipe} and unet {unet} are both given; give one: a recipe is for making a UNet")
    if not is_variant(variant):
        raise SourceError(f"variant {variant!r} is no name; write small letters, numbers and -, such as {', '.join(VARIANTS)}")
    with _source_errors(source):
        if recipe is not None:
            tuning.recipe(str(recipe))
        found = find_source(source, config, variant_files, vae=vae is None)
        own_vae = None if vae is None else find_vae(vae, found.folder / "vae")
        if unet is not None:
            check_part(source, unet.parent, unet.name)
        for lora in loras:
            lora.check()
    return Checkpoint(found, unet, recipe, tuple(loras), own_vae)
