"""Where weights come from: the embedded ``mini`` model, a diffusers folder, a hub id, or, for measurements, random numbers."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from tuning.assembly import assemble
from tuning.changes import KEY, apply_changes, changes_of
from tuning.errors import TuningError
from tuning.folder import load_unet, unet_from
from tuning.recipes import RECIPES

__all__ = ["MINI", "RANDOM", "RANDOM_CONFIGS", "UNetSource", "check_part", "find_folder", "open_unet", "random_unet"]

MINI = Path(__file__).resolve().parents[1] / "models" / "mini"
RANDOM = "random:"
"""What the name of a source with random weights starts with."""

_CONFIGS = Path(__file__).parent / "configs"
_PLAIN = tuple(sorted(path.stem for path in _CONFIGS.glob("*.json")))
RANDOM_CONFIGS = (*_PLAIN, *(name for name in RECIPES if name.startswith("bk-")))
"""Configurations with a name; those of a recipe are SD 1.5's, assembled by it."""

_PICKLES = {".ckpt", ".bin", ".pt", ".pth", ".pkl"}
_CHOICES = "give 'mini', a diffusers folder, or a hub id"
_CONVERT = (
    "python -c \"from diffusers import StableDiffusionPipeline as P; P.from_single_file('{path}').save_pretrained('{folder}')\""
)
_HUB_FILES = ("*.json", "*/*.json", "*/*.txt", "diffusion_pytorch_model.safetensors", "*/diffusion_pytorch_model.safetensors",
              "text_encoder/model.safetensors")  # fmt: skip


@dataclass(frozen=True)
class UNetSource:
    """A UNet that can be loaded. ``folder`` is its own, ``whole`` that of the checkpoint it is a part of, where there is one."""

    name: str
    folder: Path | None = None
    whole: Path | None = None

    def unet(self) -> UNet2DConditionModel:
        """The UNet, float32, in evaluation mode. Raises TuningError when its files cannot be read."""
        return random_unet(self.name) if self.folder is None else load_unet(self.folder)


def open_unet(source: str) -> UNetSource:
    """Find a UNet: ``mini``, a diffusers folder (of a whole checkpoint or of a UNet), a hub id, or ``random:CONFIG``.

    Raises:
        TuningError: there is no such source, or it holds no UNet with safetensors.
    """
    if source.startswith(RANDOM):
        _random_config(source)
        return UNetSource(source)
    folder = find_folder(source)
    if not (folder / "unet").is_dir() and (folder / "config.json").is_file():
        _check_weights(source, folder)
        return UNetSource(source, folder)
    check_part(source, folder, "unet")
    return UNetSource(source, folder / "unet", folder)


def random_unet(source: str, seed: int = 0) -> UNet2DConditionModel:
    """The UNet of a ``random:`` source: seeded random weights, float32, in evaluation mode. For measurements of time and size.

    Raises:
        TuningError: the configuration is neither one of ``RANDOM_CONFIGS`` nor a UNet's config.json.
    """
    path, recipe = _random_config(source)
    with torch.device("meta"):
        shape = unet_from(path)
        if recipe is not None:
            shape = assemble(shape, RECIPES[recipe])
    config = {key: value for key, value in shape.config.items() if key not in ("_use_default_values", KEY)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: UNet2DConditionModel = UNet2DConditionModel.from_config(config)
        apply_changes(made, changes_of(shape))
    return made.eval()


def _random_config(source: str) -> tuple[Path, str | None]:
    """The file of the configuration, and the recipe by which it is to be assembled."""
    name = source.removeprefix(RANDOM)
    if name in _PLAIN:
        return _CONFIGS / f"{name}.json", None
    if name in RANDOM_CONFIGS:
        return _CONFIGS / "sd15.json", name
    if Path(name).suffix == ".json" and Path(name).is_file():
        return Path(name), None
    raise TuningError(
        f"source {source}: no such configuration; choose from: {', '.join(RANDOM_CONFIGS)}, or a UNet's config.json"
    )


def find_folder(source: str) -> Path:
    """The folder of ``mini``, of a path, or of a hub id such as ``owner/name`` (fetched into the hub's cache).

    Raises:
        TuningError: there is no such folder or repository, or it is a single file.
    """
    path = MINI if source == "mini" else Path(source).expanduser()
    if path.is_file() or path.suffix in {*_PICKLES, ".safetensors"}:
        raise TuningError(_single_file(path))
    return path if path.is_dir() else _fetch(source)


def check_part(name: str, checkpoint: Path, part: str, *, weights: bool = True) -> None:
    """Raise TuningError unless a checkpoint's folder has the part, with safetensors where it has ``weights``."""
    folder = checkpoint / part
    if not folder.is_dir() or not any(folder.glob("*.json")):
        raise TuningError(
            f"source {name}: {folder} is missing; a diffusers folder has unet, vae, text_encoder, tokenizer and scheduler"
        )
    if weights:
        _check_weights(name, folder)


def _check_weights(name: str, folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = [path.name for path in folder.iterdir() if path.suffix in _PICKLES]
    if pickles:
        whole = folder.parent
        raise TuningError(
            f"source {name}: {folder / pickles[0]} is a pickle, which can run code when it is read; "
            f'if you trust it, convert it once: python -c "from diffusers import StableDiffusionPipeline as P; '
            f"P.from_pretrained('{whole}').save_pretrained('{whole}-safetensors')\""
        )
    raise TuningError(f"source {name}: no .safetensors file in {folder}")


def _single_file(path: Path) -> str:
    if not path.exists():
        return f"source {path}: no such file; give 'mini', a diffusers folder or a hub id"
    convert = _CONVERT.format(path=path, folder=path.with_suffix(""))
    if path.suffix in _PICKLES:
        return f"source {path} is a pickle, which can run code when it is read; if you trust it, convert it once: {convert}"
    return f"source {path} is a single file; convert it to a diffusers folder once: {convert}"


def _fetch(source: str) -> Path:
    """Fetch a hub repository's configurations and safetensors, or find them in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    unknown = f"unknown source {source!r}: no such folder"
    if source.count("/") != 1 or source.startswith((".", "/")):
        raise TuningError(f"{unknown}; {_CHOICES} such as owner/name")
    try:
        return Path(snapshot_download(source, allow_patterns=list(_HUB_FILES)))
    except (LocalEntryNotFoundError, OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise TuningError(
            f"{unknown}, and the hub gave no repository of that name ({reason}); {_CHOICES}; "
            "a gated repository needs: hf auth login"
        ) from error
