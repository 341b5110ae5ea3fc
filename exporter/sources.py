"""Where weights come from: the embedded ``mini`` model, a diffusers folder, or a hub id."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

import tuning
from engines.bundle import sha256
from engines.manifest import Variant
from exporter.errors import SourceError

__all__ = ["MINI", "VARIANTS", "Checkpoint", "open_source"]

MINI = Path(__file__).resolve().parents[1] / "models" / "mini"
VARIANTS: tuple[str, ...] = get_args(Variant)

_PICKLES = {".ckpt", ".bin", ".pt", ".pth", ".pkl"}
_PARTS = ("unet", "vae", "text_encoder")
_CONVERT = (
    "python -c \"from diffusers import StableDiffusionPipeline as P; P.from_single_file('{path}').save_pretrained('{folder}')\""
)


@dataclass(frozen=True)
class Checkpoint:
    """A Stable Diffusion checkpoint in the diffusers folder layout. Weights are read when asked for."""

    name: str
    folder: Path

    @property
    def guidance_scale(self) -> float:
        """What pictures look best with: Stable Diffusion's usual 7.5; the embedded model was measured to want less."""
        return 3.0 if self.folder == MINI else 7.5

    def unet_folder(self, variant: str) -> str:
        """The sub-folder that holds a variant's UNet: ``unet_assembled`` where it was distilled, else ``unet``."""
        own = f"unet_{variant}"
        return own if (self.folder / own / "config.json").is_file() else "unet"

    def unet(self, variant: str) -> UNet2DConditionModel:
        """The UNet of a variant, float32, in evaluation mode; made of the original by the recipe of that name where none is stored.

        Raises:
            SourceError: the checkpoint has no such variant and none can be made.
        """
        folder = self.unet_folder(variant)
        with self._reading(folder):
            unet = tuning.load_unet(self.folder / folder)
        if variant == "original" or folder != "unet":
            return unet
        try:
            return tuning.assemble(unet, tuning.recipe(variant)).eval()
        except tuning.TuningError as error:
            raise SourceError(f"source {self.name} has no {variant} UNet, and none can be made of its UNet: {error}") from error

    def is_distilled(self, variant: str) -> bool:
        """Whether the variant's weights were trained for it, not only cut out of the original's."""
        return variant == "original" or self.unet_folder(variant) != "unet"

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

    def files(self, variant: str) -> Iterator[Path]:
        """Every file that a build of the variant reads."""
        for part in (self.unet_folder(variant), "vae", "text_encoder", "tokenizer", "scheduler"):
            yield from sorted(path for path in (self.folder / part).rglob("*") if path.is_file())

    def fingerprint(self, variant: str) -> str:
        """A hash of all those files."""
        digest = hashlib.sha256()
        for path in self.files(variant):
            digest.update(f"{path.relative_to(self.folder)} {sha256(path)}\n".encode())
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


def open_source(source: str, variant: str) -> Checkpoint:
    """Find a checkpoint and check that a build can read it.

    Args:
        source: ``mini``, a diffusers folder, or a hub id such as ``owner/name`` (fetched into the hub's cache).
        variant: original, assembled or condconv.

    Raises:
        SourceError: unknown variant or source, a pickle, or a folder with parts missing.
    """
    if variant not in VARIANTS:
        raise SourceError(f"unknown variant {variant!r}; choose from: {', '.join(VARIANTS)}")
    path = MINI if source == "mini" else Path(source).expanduser()
    if path.is_file() or path.suffix in {*_PICKLES, ".safetensors"}:
        raise SourceError(_single_file(path))
    if not path.is_dir():
        path = _fetch(source)
    checkpoint = Checkpoint(source, path)
    for part in (*_PARTS, "tokenizer", "scheduler"):
        _check_part(checkpoint, part)
    return checkpoint


def _single_file(path: Path) -> str:
    if not path.exists():
        return f"source {path}: no such file; give 'mini', a diffusers folder or a hub id"
    convert = _CONVERT.format(path=path, folder=path.with_suffix(""))
    if path.suffix in _PICKLES:
        return f"source {path} is a pickle, which can run code when it is read; if you trust it, convert it once: {convert}"
    return f"source {path} is a single file; convert it to a diffusers folder once: {convert}"


def _check_part(checkpoint: Checkpoint, part: str) -> None:
    folder = checkpoint.folder / part
    if not folder.is_dir() or not any(folder.glob("*.json")):
        raise SourceError(
            f"source {checkpoint.name}: {folder} is missing; "
            "a diffusers folder has unet, vae, text_encoder, tokenizer and scheduler"
        )
    if part in _PARTS and not any(folder.glob("*.safetensors")):
        pickles = [path.name for path in folder.iterdir() if path.suffix in _PICKLES]
        if pickles:
            raise SourceError(
                f"source {checkpoint.name}: {folder / pickles[0]} is a pickle, which can run code when it is read; "
                f'if you trust it, convert it once: python -c "from diffusers import StableDiffusionPipeline as P; '
                f"P.from_pretrained('{checkpoint.folder}').save_pretrained('{checkpoint.folder}-safetensors')\""
            )
        raise SourceError(f"source {checkpoint.name}: no .safetensors file in {folder}")


def _fetch(source: str) -> Path:
    """Fetch a hub repository's configurations and safetensors, or find them in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    unknown = f"unknown source {source!r}: no such folder"
    if source.count("/") != 1 or source.startswith((".", "/")):
        raise SourceError(f"{unknown}; give 'mini', a diffusers folder, or a hub id such as owner/name")
    patterns = [
        "*/*.json",
        "*/*.txt",
        "*/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "model_index.json",
    ]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (LocalEntryNotFoundError, OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(
            f"{unknown}, and the hub gave no repository of that name ({reason}); give 'mini', a diffusers folder, or a hub id; "
            "a gated repository needs: hf auth login"
        ) from error
