"""Which files of a part's folder are its weights: diffusers' rule, by names alone, so that no other file is opened.

Weights are one safetensors file, or shards and the index that names them, under the library's own name or with a variant in it
(``diffusion_pytorch_model.fp16.safetensors``). Of several variants one is read, never a mixture. diffusers looks for the index
first, transformers, which reads text encoders, for the one file.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from tuning.checkpoints.configs import text_settings
from tuning.checkpoints.files import check_file, read_json
from tuning.errors import TuningError

__all__ = [
    "PICKLES",
    "WeightFiles",
    "choose_variant",
    "find_weights",
    "stem_of",
    "variant_patterns",
    "variants_in",
    "weights_named_in",
]

PICKLES = frozenset({".ckpt", ".bin", ".pt", ".pth", ".pkl"})
_SHARD = r"-\d+-of-\d+"


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors ``files`` of one part, the ``index`` that named them if they are shards, and their ``variant``."""

    files: tuple[Path, ...]
    index: Path | None = None
    variant: str | None = None

    @property
    def all(self) -> tuple[Path, ...]:
        """Every file that is read."""
        return self.files if self.index is None else (*self.files, self.index)


def stem_of(part: str) -> str:
    """The stem of the names of a part's weight files: transformers' for the text encoder, diffusers' for other parts."""
    return "model" if part == "text_encoder" else "diffusion_pytorch_model"


def _single(stem: str, variant: str | None) -> str:
    return f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"


def _index(stem: str, variant: str | None) -> str:
    return f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json"


def variants_in(names: Iterable[str], stem: str) -> list[str | None]:
    """The variants of which there is a file or an index, None for the weights without one, which come first."""
    single = re.compile(rf"{stem}(?:\.([^.]+))?\.safetensors")
    index = re.compile(rf"{stem}\.safetensors\.index(?:\.([^.]+))?\.json")
    found = {match[1] for name in names if (match := single.fullmatch(name) or index.fullmatch(name))}
    # The shards of a variant look like a variant of their own.
    whole = {variant for variant in found if variant is None or not re.search(rf"{_SHARD}$", variant)}
    return sorted(whole, key=lambda variant: (variant is not None, variant or ""))


def choose_variant(where: object, found: Collection[str | None], wanted: str | None) -> str | None:
    """The variant to read: the one that is wanted, else the weights without one, else the only one that there is.

    Raises:
        TuningError: none is there, or several and none without a variant.
    """
    if wanted in found:
        return wanted
    if None in found:
        return None
    if wanted is None and len(found) == 1:
        return next(iter(found))
    names = ", ".join(sorted(str(variant) for variant in found))
    if wanted is not None:
        raise TuningError(f"{where} has no weights of the variant {wanted}; choose from: {names}")
    raise TuningError(f"{where} has its weights in several variants only: {names}; name one of them with --variant-files")


def variant_patterns(part: str, variant: str | None) -> list[str]:
    """Patterns of the names, within a repository, of a part's weights in this variant."""
    stem = f"{part}/{stem_of(part)}"
    shards = (
        [f"{stem}.{variant}-*.safetensors", f"{stem}-*.{variant}.safetensors"]
        if variant
        else [f"{stem}-?????-of-?????.safetensors"]
    )
    return [_single(stem, variant), _index(stem, variant), *shards]


def find_weights(folder: Path, wanted: str | None = None) -> WeightFiles:
    """The files of a part's weights; the folder's name tells the part.

    Raises:
        TuningError: there are none, an index or a shard is missing or damaged, or a file is a Git LFS pointer.
    """
    if (named := weights_named_in(folder)) is not None:
        path = folder / named
        check_file(path)
        return WeightFiles((path,)) if path.suffix == ".safetensors" else _checked(WeightFiles(_shards(path), path))
    stem = stem_of(folder.name)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    found = variants_in(names, stem)
    if not found:
        raise TuningError(_what_else(folder, names, stem))
    variant = choose_variant(folder, found, wanted)
    single, index = folder / _single(stem, variant), folder / _index(stem, variant)
    sharded = index.name in names and (stem != "model" or single.name not in names)
    weights = WeightFiles(_shards(index), index, variant) if sharded else WeightFiles((single,), None, variant)
    return _checked(weights)


def weights_named_in(folder: Path) -> str | None:
    """The file or index that a text encoder's configuration names as its weights (``transformers_weights``), if it names any.

    transformers then reads it and no other.

    Raises:
        TuningError: it is no safetensors file beside the configuration; transformers would open a pickle of a certain name.
    """
    path = folder / "config.json"
    if stem_of(folder.name) != "model" or not path.is_file():
        return None
    named = text_settings(read_json(path)).get("transformers_weights")
    if named is None:
        return None
    if not isinstance(named, str) or Path(named).name != named or not named.endswith((".safetensors", ".safetensors.index.json")):
        raise TuningError(
            f"{path} has transformers_weights = {named!r:.60}; it may name a .safetensors file beside it or an index of some, or "
            "be left out"
        )
    return named


def _checked(weights: WeightFiles) -> WeightFiles:
    for path in weights.files:
        check_file(path)
    return weights


def _shards(index: Path) -> tuple[Path, ...]:
    """The files that an index names, all of them beside it."""
    try:
        names = set(read_json(index)["weight_map"].values())
        if not names:
            raise ValueError("it names no file")
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"it names {name!r:.60}")
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise TuningError(f"{index} is no index of safetensors files ({reason}); get it again, with its shards") from error
    return tuple(sorted(index.with_name(name) for name in names))


def _what_else(folder: Path, names: set[str], stem: str) -> str:
    """Why a folder has no weights for us."""
    if shards := sorted(name for name in names if re.fullmatch(rf"{stem}.*{_SHARD}.*\.safetensors", name)):
        return f"{folder} has shards such as {shards[0]} without their index {_index(stem, None)}; get it too"
    if others := sorted(name for name in names if name.endswith(".safetensors")):
        return f"{folder} has {others[0]}, but no {stem}.safetensors; give it that name, if it holds the model's weights"
    if pickles := sorted(name for name in names if Path(name).suffix in PICKLES):
        return f"{folder / pickles[0]} is a pickle, which can run code when it is read"
    return f"no .safetensors file in {folder}: it needs {stem}.safetensors, as save_pretrained writes it"
