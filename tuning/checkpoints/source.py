"""A whole Stable Diffusion checkpoint: the modules of its parts without weights, and the weights, whatever they are kept in."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Size, nn

from engines.support.files import is_folder
from engines.support.records import one_line
from engines.support.tokenizers import check_tokenizer, length_in, load_clip_tokenizer
from tuning.checkpoints.configs import Extent, check_fit
from tuning.checkpoints.files import CONFIGURATIONS, check_file, read_json
from tuning.checkpoints.folder import extent_of, meta_unet, unet_weights
from tuning.checkpoints.part_loaders import LOADERS, SKELETONS
from tuning.checkpoints.prediction import read_prediction
from tuning.checkpoints.single_file import has_only_averages, misfit, shapes_in_file, single_file_weights
from tuning.checkpoints.weight_files import PICKLES, find_weights
from tuning.checkpoints.weights import (
    LoadedWeights,
    RandomWeights,
    Weights,
    check_floating,
    materialize,
    names_in,
    shapes_in,
    shapes_of,
)
from tuning.errors import TuningError
from tuning.surgery.assembly import assemble
from tuning.surgery.recipes import RECIPES

__all__ = ["PARTS", "FileSource", "FolderSource", "RandomSource", "Source", "check_part", "library_weights", "reading"]

PARTS = {"unet": True, "vae": True, "text_encoder": True, "tokenizer": False, "scheduler": False}
"""The folders of a checkpoint, and whether they hold weights."""
_PREFIX = "text_model."
"""Of a text encoder's weights in most files; some versions of transformers leave it out."""
_ADAPTER = re.compile(r"\.base_layer\.|lora[._]|\.(hada|lokr)_w|\.oft_[a-z]|\.ia3_l", re.IGNORECASE)
"""In the names of tensors that diffusers, PEFT, Kohya's scripts and LyCORIS add to a model."""


@dataclass(frozen=True)
class Source(ABC):
    """A Stable Diffusion checkpoint. ``folder`` has its configurations, tokenizer and scheduler, in the diffusers layout."""

    name: str
    folder: Path

    def skeleton(self, part: str) -> nn.Module:
        """A part (``unet``, ``vae``, ``text_encoder``) without weights: parameters on the meta device, in evaluation mode.

        Raises:
            TuningError: its configuration is missing or no such model's.
        """
        if part == "unet":
            unet: nn.Module = meta_unet(self.folder / part / "config.json", self._extent(part))
            return unet
        with reading(self.name, self.folder / part):
            return SKELETONS[part](self.folder / part, self._extent(part)).eval()

    def _extent(self, part: str) -> Extent | None:
        """How much the part's weights can describe; None where there are no files of them."""
        return None

    @abstractmethod
    def weights(self, part: str, skeleton: nn.Module | None = None) -> Weights:
        """Where a part's weights are.

        Args:
            part: ``unet``, ``vae`` or ``text_encoder``.
            skeleton: the part's, where it has been made already.

        Raises:
            TuningError: they are missing or others than the configuration's.
        """

    @abstractmethod
    def files(self, part: str) -> Iterator[Path]:
        """Every file that reading a part, ``tokenizer`` or ``scheduler`` depends on."""

    def tokenizer(self, text: Any) -> Any:
        """The tokenizer, whose prompts are as long as its text encoder reads.

        Args:
            text: the text encoder's configuration.

        Raises:
            TuningError: it is another's, or does not work.
        """
        folder, length = self.folder / "tokenizer", self.text_length(text)
        with reading(self.name, folder):
            tokenizer = load_clip_tokenizer(folder)
            check_tokenizer(tokenizer, length, text.vocab_size)
        tokenizer.model_max_length = length
        return tokenizer

    def text_length(self, text: Any) -> int:
        """Tokens of a prompt, as diffusers' pipelines pad it: those of the tokenizer, as far as the text encoder can read them.

        Args:
            text: the text encoder's configuration.

        Raises:
            TuningError: the tokenizer's configuration cannot be read.
        """
        with reading(self.name, self.folder / "tokenizer"):
            found = length_in(self.folder / "tokenizer")
        positions: int = text.max_position_embeddings
        return positions if found is None else min(found, positions)

    def scheduler_changes(self) -> dict[str, Any]:
        """Settings of the scheduler that the weights ask for and its configuration lacks."""
        return {}

    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler's configuration. Raises TuningError where there is none."""
        with reading(self.name, self.folder / "scheduler"):
            return read_json(self.folder / "scheduler" / "scheduler_config.json") | self.scheduler_changes()

    def notes(self) -> list[str]:
        """Remarks on how the source is read, for a person."""
        return []

    def check_fit(self) -> None:
        """Raise TuningError unless the parts fit together as text to image needs it: latent channels, and the text's width.

        A VAE that is missing is not asked for.
        """
        parts = ("vae", "unet", "text_encoder") if (self.folder / "vae").is_dir() else ("unet", "text_encoder")
        self._check_fit({part: self.skeleton(part) for part in parts})

    def _check_fit(self, skeletons: Mapping[str, Any]) -> None:
        """Raise TuningError unless these parts fit together."""
        configs = {part: skeleton.config for part, skeleton in skeletons.items()}
        check_fit(self.name, configs["unet"], configs.get("vae"), configs["text_encoder"])

    def model(self, part: str, skeleton: nn.Module | None = None) -> Any:
        """A whole part, float32, in evaluation mode; made of its ``skeleton``, where that is given.

        Raises:
            TuningError: as ``skeleton`` and ``weights``.
        """
        bare = self.skeleton(part) if skeleton is None else skeleton
        return materialize(bare, self.weights(part, bare))

    def models(self) -> dict[str, Any]:
        """UNet, text encoder and VAE, whole, which fit together. Raises TuningError as ``check_fit`` and ``model`` do."""
        skeletons = {part: self.skeleton(part) for part in ("vae", "unet", "text_encoder")}
        self._check_fit(skeletons)
        return {part: self.model(part, skeletons[part]) for part in ("unet", "text_encoder", "vae")}


@dataclass(frozen=True)
class FolderSource(Source):
    """A diffusers folder: the embedded model, the user's, or one from the hub.

    Args:
        variant: of the weights' files, such as ``fp16``, for the parts that have it; None for those without one, or the only
            one that a part has.
    """

    variant: str | None = None

    def weights(self, part: str, skeleton: nn.Module | None = None) -> Weights:
        """From the part's safetensors; those of VAE and text encoder are read by their libraries, which know older names."""
        check_part(self.name, self.folder, part, variant=self.variant)
        folder, bare = self.folder / part, self.skeleton(part) if skeleton is None else skeleton
        if part == "unet":
            return unet_weights(folder, bare, self.variant)
        return library_weights(self.name, folder, part, bare, self.variant)

    def files(self, part: str) -> Iterator[Path]:
        """A part's configuration and weights, without the files of other variants; all of the tokenizer's and scheduler's."""
        if PARTS[part]:
            yield from sorted((self.folder / part / "config.json", *find_weights(self.folder / part, self.variant).all))
        else:
            yield from _configurations(self.folder / part)

    def _extent(self, part: str) -> Extent | None:
        return extent_of(self.folder / part, self.variant)


def library_weights(name: str, folder: Path, part: str, skeleton: nn.Module, variant: str | None) -> Weights:
    """The weights in the folder of a VAE or a text encoder, as its library loads them. Raises TuningError for others than its."""
    found, shapes = find_weights(folder, variant), shapes_of(skeleton)
    _check_known(folder, shapes, {name: shape for file in found.files for name, shape in shapes_in(file).items()})

    def load(dtype: torch.dtype) -> nn.Module:
        with reading(name, folder):
            return LOADERS[part](folder, dtype, found.variant)

    return LoadedWeights(str(folder), shapes, load)


@dataclass(frozen=True)
class FileSource(Source):
    """One .safetensors file in CompVis' layout, ``path``; ``folder`` has no weights, or not these.

    Args:
        configured: whether the user named ``folder``, whose scheduler then counts for more than what the file says of it.
    """

    path: Path
    configured: bool = False

    def skeleton(self, part: str) -> nn.Module:
        """As any source's. Raises TuningError also where the file is of a smaller model than the configuration's."""
        try:
            return super().skeleton(part)
        except TuningError as error:
            raise misfit(self.path, part, self.folder, str(error)) from error

    def weights(self, part: str, skeleton: nn.Module | None = None) -> Weights:
        """From the file."""
        return single_file_weights(self.path, part, self.skeleton(part) if skeleton is None else skeleton, self.folder)

    def scheduler_changes(self) -> dict[str, Any]:
        """Whether its UNet predicts the noise or v, where the file says so."""
        found = read_prediction(self.path)
        return {} if found is None or self.configured else found.scheduler_changes

    def notes(self) -> list[str]:
        """Remarks: its prediction type, where the file names one, and whether its weights are averaged ones."""
        found, notes = read_prediction(self.path), []
        if found is not None:
            kept = " (the scheduler is that of --config)" if self.configured else ""
            notes.append(f"source {self.name}: {found}{kept}")
        if has_only_averages(names_in(self.path)):
            notes.append(f"source {self.name}: its UNet's weights are averaged ones (model_ema.), the only ones that it has")
        return notes

    def _extent(self, part: str) -> Extent | None:
        shapes = shapes_in_file(self.path, part)
        return Extent.of(shapes) if shapes else None

    def files(self, part: str) -> Iterator[Path]:
        """The file, for the UNet, and what configures the part."""
        if part == "unet":
            yield self.path
        yield from _configurations(self.folder / part)


@dataclass(frozen=True)
class RandomSource(Source):
    """Seeded random weights, for measurements of time, size and error.

    Args:
        unet_config: the config.json of the UNet.
        recipe: by which that UNet is assembled.
    """

    unet_config: Path
    recipe: str | None = None
    seed: int = 0

    def skeleton(self, part: str) -> nn.Module:
        """As any source's; the UNet by its recipe."""
        if part != "unet":
            return super().skeleton(part)
        unet: nn.Module = meta_unet(self.unet_config)
        return unet if self.recipe is None else assemble(unet, RECIPES[self.recipe])

    def weights(self, part: str, skeleton: nn.Module | None = None) -> Weights:
        """Drawn when they are taken."""
        return RandomWeights(part, shapes_of(self.skeleton(part) if skeleton is None else skeleton), self.seed)

    def files(self, part: str) -> Iterator[Path]:
        """The part's configurations."""
        if part == "unet":
            yield self.unet_config
        else:
            yield from _configurations(self.folder / part)


def _configurations(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in {".safetensors", *PICKLES})


@contextmanager
def reading(name: str, folder: Path) -> Iterator[None]:
    """Turn what diffusers and transformers raise for missing and damaged files, of many kinds, into TuningError."""
    check_part(name, folder.parent, folder.name, weights=False)
    try:
        yield
    except TuningError as error:
        raise TuningError(f"source {name}: {error}") from error
    except Exception as error:
        reason = one_line((str(error).strip() or type(error).__name__).splitlines()[0], 300)
        raise TuningError(
            f"source {name}: {folder} cannot be read ({reason}); get its files again, or save the model again with diffusers' "
            "save_pretrained"
        ) from error


def check_part(name: str, checkpoint: Path, part: str, *, weights: bool = True, variant: str | None = None) -> None:
    """Raise TuningError unless a checkpoint's folder has the part, with safetensors of the variant where it has ``weights``."""
    folder = checkpoint / part
    if not is_folder(folder) or not any(folder.glob("*.json")):
        raise TuningError(
            f"source {name}: {folder} is missing; a diffusers folder has unet, vae, text_encoder, tokenizer and scheduler"
        )
    for path in folder.iterdir():
        if path.name in CONFIGURATIONS:
            check_file(path)
    if weights:
        _check_weights(name, folder, variant)


def _check_weights(name: str, folder: Path, variant: str | None) -> None:
    """Raise TuningError unless the part's own weights are there, and numbers of floating point, with no adapter among them."""
    try:
        files = find_weights(folder, variant).files
    except TuningError as error:
        if any(folder.glob("*.safetensors")):
            raise TuningError(f"source {name}: {error}") from error
        whole = folder.parent if Path(name).exists() else name  # no pickle is fetched from the hub
        raise TuningError(
            f"source {name}: {error}; if you trust the pickle that there is, convert it once: "
            'python -c "from diffusers import StableDiffusionPipeline as P; '
            f"P.from_pretrained('{whole}').save_pretrained('{whole}-safetensors')\""
        ) from error
    for path in files:
        adapters = (tensor for tensor in names_in(path) if _ADAPTER.search(tensor))
        if found := next(adapters, None):
            raise TuningError(
                f"source {name}: {path} holds a LoRA that was not fused ({found}): load the checkpoint and the LoRA with "
                "diffusers, then pipe.fuse_lora(), pipe.unload_lora_weights() and pipe.save_pretrained(FOLDER), and give FOLDER"
            )
        check_floating(path)


def _check_known(folder: Path, shapes: Mapping[str, Size], found: Mapping[str, Size]) -> None:
    """Raise TuningError where weights differ from what their configuration describes; under other names they may be older."""
    known = 0
    for name, wanted in shapes.items():
        shape = found.get(name) or found.get(f"{_PREFIX}{name}") or found.get(name.removeprefix(_PREFIX))
        known += shape is not None
        if shape is not None and shape != wanted:
            raise TuningError(
                f"{folder}: the weights are not those of its configuration ({name} is {tuple(shape)}, not {tuple(wanted)}); "
                "get both again"
            )
    if 2 * known < len(shapes):
        raise TuningError(f"{folder}: the weights are not those of its configuration (few names are the same); get both again")
