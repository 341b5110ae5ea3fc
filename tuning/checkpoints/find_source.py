"""Where weights come from: an embedded model, a diffusers folder, a hub id, a single file, or random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engines.support.files import exists, expanded, is_file, is_folder, real_path
from runtime.embedded import EXAMPLES
from tuning.checkpoints.configs import text_width
from tuning.checkpoints.folder import load_unet, meta_unet
from tuning.checkpoints.single_file import GIVE_CONFIG, check_single_file, text_width_in_file
from tuning.checkpoints.source import PARTS, FileSource, FolderSource, RandomSource, Source, check_part
from tuning.checkpoints.weight_files import PICKLES, choose_variant, stem_of, variant_patterns, variants_in
from tuning.errors import TuningError
from tuning.surgery.recipes import RECIPES

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = [
    "EMBEDDED",
    "RANDOM",
    "RANDOM_CONFIGS",
    "SD15",
    "UNetSource",
    "check_apart",
    "fetch",
    "find_source",
    "named_path",
    "open_unet",
    "path_of",
    "random_unet",
]

_PACKAGE = Path(__file__).resolve().parents[1]
_MODELS = next((found for found in [_PACKAGE / "models"] if found.is_dir()), _PACKAGE.parent / "models")
"""Inside of the installed package (see setup.py), or else the repository's."""
EMBEDDED, SD15 = {name: _MODELS / name for name in EXAMPLES}, _MODELS / "sd15"
RANDOM = "random:"
"""Prefix of the names of sources with random weights."""

_FAMILIES = {768: "sd15", 1024: "sd21"}
"""By the width of the text that the UNet reads: the folder with the family's configurations."""
RANDOM_CONFIGS = (*_FAMILIES.values(), *(name for name in RECIPES if name.startswith("bk-")))
"""Configurations with a name; those of a recipe are SD 1.5's, assembled by it."""

_CHOICES = "give 'emoji', a diffusers folder, a .safetensors file, or a hub id"
_CONVERT = (
    "python -c \"from diffusers import StableDiffusionPipeline as P; P.from_single_file('{path}').save_pretrained('{folder}')\""
)
_HUB_CONFIGURATIONS = ("*.json", "*/*.json", "*/*.txt")


@dataclass(frozen=True)
class UNetSource:
    """A UNet that can be loaded: in a ``folder`` of its own (files of a ``variant``), in a ``whole`` checkpoint, or random."""

    name: str
    folder: Path | None = None
    whole: Source | None = None
    variant: str | None = None

    def unet(self) -> UNet2DConditionModel:
        """The UNet, float32, in evaluation mode. Raises TuningError when its files cannot be read."""
        if self.whole is not None:
            unet: UNet2DConditionModel = self.whole.model("unet")
            return unet
        return random_unet(self.name) if self.folder is None else load_unet(self.folder, self.variant)


def open_unet(source: str, variant: str | None = None) -> UNetSource:
    """Find a UNet: in any source of a whole checkpoint, or in a folder of its own, as diffusers writes it.

    Args:
        source: as ``find_source`` takes it, or a UNet's folder.
        variant: of the weights' files, as in ``find_source``.

    Raises:
        TuningError: there is no such source, or it holds no UNet with safetensors.
    """
    _check_variant(source, variant)
    if source.startswith(RANDOM):
        _random_config(source)
        return UNetSource(source)
    path = path_of(source)
    if path.suffix == ".safetensors":
        return UNetSource(source, whole=_file_source(source, path, None))
    folder = path if is_folder(path) else fetch(source, variant)
    if not (folder / "unet").is_dir() and (folder / "config.json").is_file():
        check_part(source, folder.parent, folder.name, variant=variant)
        _check_has(source, folder, variant)
        return UNetSource(source, folder, variant=variant)
    check_part(source, folder, "unet", variant=variant)
    _check_has(source, folder, variant)
    return UNetSource(source, whole=FolderSource(source, folder, variant))


def random_unet(source: str, seed: int = 0) -> UNet2DConditionModel:
    """The UNet of a ``random:`` source: seeded random weights, float32, in evaluation mode. For measurements of time and size.

    Raises:
        TuningError: the configuration is neither one of ``RANDOM_CONFIGS`` nor a UNet's config.json.
    """
    path, recipe = _random_config(source)
    unet: UNet2DConditionModel = RandomSource(source, path.parent, path, recipe, seed).model("unet")
    return unet


def find_source(source: str, config: Path | None = None, variant: str | None = None, *, vae: bool = True) -> Source:
    """Find a whole checkpoint.

    Args:
        source: ``emoji``, ``mini``, a diffusers folder, a hub id such as ``owner/name`` (fetched into the hub's cache), a
            .safetensors file in CompVis' layout, or ``random:CONFIG``.
        config: for the two last ones, a diffusers folder whose configurations are taken instead of the family's.
        variant: of the weights' files in a folder, such as ``fp16``; None for those without one, or the only one there is.
        vae: whether it has to have a VAE.

    Raises:
        TuningError: there is no such source, a part of it is missing, or its weights are pickled.
    """
    if config is not None and not is_file(config / "unet" / "config.json"):
        raise TuningError(f"config {config} is no diffusers folder: {config / 'unet' / 'config.json'} is missing")
    _check_variant(source, variant)
    if source.startswith(RANDOM):
        return _random_source(source, config)
    path = path_of(source)
    if path.suffix == ".safetensors":
        return _file_source(source, path, config)
    if config is not None:
        raise TuningError(f"source {source} has configurations of its own: leave --config out, which is for single files")
    folder = path if is_folder(path) else fetch(source, variant)
    for part, has_weights in PARTS.items():
        if vae or part != "vae":
            check_part(source, folder, part, weights=has_weights, variant=variant)
    _check_has(source, folder, variant)
    return FolderSource(source, folder, variant)


def _check_variant(source: str, variant: str | None) -> None:
    if variant is not None and (source.startswith(RANDOM) or Path(source).suffix == ".safetensors"):
        raise TuningError(f"source {source} has no files in variants: leave --variant-files out, which is for diffusers folders")


def _check_has(source: str, folder: Path, variant: str | None) -> None:
    """Raise TuningError where no part has weights of the variant: a name that was misspelt would be without effect."""
    found: set[str | None] = set()
    for each in (folder, *(folder / part for part, has_weights in PARTS.items() if has_weights)):
        names = [path.name for path in each.iterdir()] if each.is_dir() else []
        found |= {name for stem in ("model", stem_of("unet")) for name in variants_in(names, stem)}
    if variant is not None and variant not in found:
        others = ", ".join(sorted(name for name in found if name)) or "none"
        raise TuningError(
            f"source {source} has no weights of the variant {variant!r:.60} (variants that it has: {others}); name one of "
            "them, or leave --variant-files out"
        )


def named_path(source: str) -> Path:
    """The folder or the file that a source's name means, whether it is there or not."""
    return EMBEDDED.get(source) or expanded(source)


def check_apart(out: Path, read: Path, what: str) -> None:
    """Raise TuningError where ``out`` is the folder ``read``, or that of a part of it: what is read may not be written over."""
    if read.is_dir() and real_path(expanded(out)) in {real_path(path) for path in (read, *(read / part for part in PARTS))}:
        raise TuningError(f"--out {out} is where the {what} is read from; choose another folder")


def path_of(source: str) -> Path:
    """The folder or the file that a source, or a VAE, is or would be.

    Raises:
        TuningError: it is a pickle, or a file that is missing.
    """
    path = named_path(source)
    if path.suffix in {*PICKLES, ".safetensors"} and not exists(path):
        raise TuningError(f"source {path}: no such file; {_CHOICES}")
    if is_file(path) and path.suffix in PICKLES:
        convert = _CONVERT.format(path=path, folder=path.with_suffix(""))
        raise TuningError(
            f"source {path} is a pickle, which can run code when it is read; if you trust it, convert it once: {convert}"
        )
    if exists(path) and not is_file(path) and not is_folder(path):
        raise TuningError(f"source {path} is neither a file nor a folder; {_CHOICES}")
    if is_file(path) and path.suffix != ".safetensors":
        raise TuningError(f"source {path} is a file of another kind than .safetensors; {_CHOICES}")
    return path


def _file_source(source: str, path: Path, config: Path | None) -> FileSource:
    check_single_file(path)
    return FileSource(source, config or _family_of(source, text_width_in_file(path)), path, config is not None)


def _random_source(source: str, config: Path | None) -> RandomSource:
    path, recipe = _random_config(source)
    if path.is_relative_to(_MODELS):
        return RandomSource(source, config or path.parents[1], path, recipe)
    return RandomSource(source, config or _family_of(source, text_width(meta_unet(path).config)), path, recipe)


def _family_of(source: str, width: object) -> Path:
    """The configurations of the family whose UNet reads text of this width."""
    for known, family in _FAMILIES.items():
        if width == known:
            return _MODELS / family
    raise TuningError(
        f"source {source}: its UNet reads text of width {width}, neither Stable Diffusion 1.x's (768) nor 2.x's (1024); "
        f"{GIVE_CONFIG}"
    )


def _random_config(source: str) -> tuple[Path, str | None]:
    """The file of the UNet's configuration, and the recipe by which it is to be assembled."""
    name = source.removeprefix(RANDOM)
    if name in RANDOM_CONFIGS:
        family = name if name in _FAMILIES.values() else "sd15"
        return _MODELS / family / "unet" / "config.json", None if name == family else name
    path = expanded(name)
    if path.suffix != ".json" or not is_file(path):
        raise TuningError(
            f"source {source}: no such configuration; choose from: {', '.join(RANDOM_CONFIGS)}, or a UNet's config.json"
        )
    return path, None


def _hub_patterns(source: str, names: Sequence[str] | None, wanted: str | None) -> list[str]:
    """Patterns of the files to fetch from a repository that has these: configurations, and weights in one variant.

    ``names`` is None where the repository cannot be asked.
    """
    patterns = list(_HUB_CONFIGURATIONS)
    for part in ("", *(part for part, has_weights in PARTS.items() if has_weights)):
        inside = f"{part}/" if part else ""
        files = [name.removeprefix(inside) for name in names or () if name.startswith(inside)]
        found = variants_in(files, stem_of(part))
        variant = choose_variant(f"source {source}: {part or 'it'}", found, wanted) if found else wanted
        patterns += [name.removeprefix("/") for name in variant_patterns(part, variant)]
    return patterns


def _hub_names(source: str) -> list[str] | None:
    """The files of a hub repository; None where the hub cannot be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError as ClientError  # type: ignore[attr-defined]  # of the HTTP client that it has
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return list(HfApi().list_repo_files(source))
    except RepositoryNotFoundError:  # gated ones among them
        raise
    except (OSError, ClientError):  # offline, on purpose or not: then the cache is asked
        return None


def fetch(source: str, variant: str | None = None) -> Path:
    """Fetch a hub repository's configurations and safetensors, or find them in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.errors import HTTPError as ClientError  # type: ignore[attr-defined]  # of the HTTP client that it has

    unknown = f"unknown source {source!r}: no such folder"
    if source.count("/") != 1 or source.startswith((".", "/")):
        raise TuningError(f"{unknown}; {_CHOICES} such as owner/name")
    try:
        return Path(snapshot_download(source, allow_patterns=_hub_patterns(source, _hub_names(source), variant)))
    except GatedRepoError as error:
        raise TuningError(
            f"source {source} is gated: agree to its terms at https://huggingface.co/{source}, then log in with: hf auth login"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise TuningError(
            f"{unknown}, and the hub has no repository of that name for you; {_CHOICES}; if it is private: hf auth login"
        ) from error
    except LocalEntryNotFoundError as error:
        why = "may not be asked: HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "cannot be reached"
        raise TuningError(f"{unknown}, it is not in the hub's cache, and the hub {why}; {_CHOICES}") from error
    except (OSError, ClientError) as error:  # a proxy's or a server's refusal, a connection that ended
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TuningError(f"source {source} could not be fetched from the hub ({reason}); try again, or {_CHOICES}") from error
