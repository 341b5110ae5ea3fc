"""A whole Stable Diffusion checkpoint: the modules of its parts without weights, and the weights, whatever they are kept in."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuning.checkpoints.folder import meta_unet, unet_weights
from tuning.checkpoints.single_file import single_file_weights
from tuning.checkpoints.weights import LoadedWeights, RandomWeights, Weights, materialize, shapes_of
from tuning.errors import TuningError
from tuning.surgery.assembly import assemble
from tuning.surgery.recipes import RECIPES

__all__ = ["PARTS", "PICKLES", "FileSource", "FolderSource", "RandomSource", "Source", "check_channels", "check_part", "reading"]

PARTS = {"unet": True, "vae": True, "text_encoder": True, "tokenizer": False, "scheduler": False}
"""The folders of a checkpoint, and whether they hold weights."""
PICKLES = {".ckpt", ".bin", ".pt", ".pth", ".pkl"}


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
            unet: nn.Module = meta_unet(self.folder / part / "config.json")
            return unet
        with reading(self.name, self.folder / part):
            return _SKELETONS[part](self.folder / part).eval()

    @abstractmethod
    def weights(self, part: str) -> Weights:
        """Where a part's weights are. Raises TuningError where they are missing or others than the configuration's."""

    @abstractmethod
    def files(self, part: str) -> Iterator[Path]:
        """Every file that reading a part, ``tokenizer`` or ``scheduler`` depends on."""

    def check_fit(self) -> None:
        """Raise TuningError unless the parts fit together as text to image needs it: latent channels, and the text's width.

        A VAE that is missing is not asked for.
        """
        unet: Any = self.skeleton("unet").config
        vae: Any = self.skeleton("vae").config if (self.folder / "vae").is_dir() else None
        check_channels(self.name, unet, vae.latent_channels if vae else unet.out_channels)
        text: Any = self.skeleton("text_encoder").config
        width = text.hidden_size
        if unet.cross_attention_dim not in (width, [width] * len(unet.down_block_types)):
            raise TuningError(
                f"source {self.name}: its UNet reads text of width {unet.cross_attention_dim} and its text encoder writes "
                f"{width}; take both from the same checkpoint"
            )

    def model(self, part: str) -> Any:
        """A whole part, float32, in evaluation mode. Raises TuningError as ``skeleton`` and ``weights`` do."""
        return materialize(self.skeleton(part), self.weights(part))


class FolderSource(Source):
    """A diffusers folder: the embedded model, the user's, or one from the hub."""

    def weights(self, part: str) -> Weights:
        """From the part's safetensors; those of VAE and text encoder are read by their libraries, which know older names."""
        check_part(self.name, self.folder, part)
        folder, skeleton = self.folder / part, self.skeleton(part)
        if part == "unet":
            return unet_weights(folder, skeleton)

        def load(dtype: torch.dtype) -> nn.Module:
            with reading(self.name, folder):
                return _LOADERS[part](folder, dtype)

        return LoadedWeights(str(folder), shapes_of(skeleton), load)

    def files(self, part: str) -> Iterator[Path]:
        """All in the part's folder."""
        yield from sorted(path for path in (self.folder / part).rglob("*") if path.is_file())


@dataclass(frozen=True)
class FileSource(Source):
    """One .safetensors file in CompVis' layout, ``path``; ``folder`` has no weights, or not these."""

    path: Path

    def weights(self, part: str) -> Weights:
        """From the file."""
        return single_file_weights(self.path, part, self.skeleton(part), self.folder)

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

    def weights(self, part: str) -> Weights:
        """Drawn when they are taken."""
        return RandomWeights(part, shapes_of(self.skeleton(part)), self.seed)

    def files(self, part: str) -> Iterator[Path]:
        """The part's configurations."""
        if part == "unet":
            yield self.unet_config
        else:
            yield from _configurations(self.folder / part)


def check_channels(name: str, unet: Any, latent: int) -> None:
    """Raise TuningError unless a UNet of this configuration takes and gives latents of so many channels."""
    if (unet.in_channels, unet.out_channels) != (latent, latent):
        raise TuningError(
            f"source {name}: its UNet takes {unet.in_channels} channels and gives {unet.out_channels}, and latents have "
            f"{latent}; a UNet that is given more than latents, as for inpainting, is not what this is for: give one for text "
            "to image, with the VAE it was trained with"
        )


def _configurations(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors")


def _vae_skeleton(folder: Path) -> nn.Module:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae: nn.Module = AutoencoderKL.from_config(AutoencoderKL.load_config(folder, local_files_only=True))
    return vae


def _text_skeleton(folder: Path) -> nn.Module:
    from accelerate import init_empty_weights
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig.from_pretrained(folder, local_files_only=True)
    with init_empty_weights(include_buffers=False):  # its position numbers are a buffer that no file has
        text: nn.Module = CLIPTextModel(config)
    return text


_SKELETONS: dict[str, Callable[[Path], nn.Module]] = {"vae": _vae_skeleton, "text_encoder": _text_skeleton}


def _load_vae(folder: Path, dtype: torch.dtype) -> nn.Module:
    from diffusers import AutoencoderKL

    vae, info = AutoencoderKL.from_pretrained(
        folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    return _complete(vae, info)


def _load_text_encoder(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import CLIPTextModel

    with _no_progress_bar():
        text, info = CLIPTextModel.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    return _complete(text, info)


def _complete(model: nn.Module, info: dict[str, Any]) -> nn.Module:
    """The model, unless a tensor that was missing was made up."""
    if info["missing_keys"]:
        raise ValueError(f"{sorted(info['missing_keys'])[0]} is missing")
    return model


_LOADERS: dict[str, Callable[[Path, torch.dtype], nn.Module]] = {"vae": _load_vae, "text_encoder": _load_text_encoder}


@contextmanager
def reading(name: str, folder: Path) -> Iterator[None]:
    """Turn what diffusers and transformers raise for missing and damaged files, of many kinds, into TuningError."""
    check_part(name, folder.parent, folder.name, weights=False)
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TuningError(
            f"source {name}: {folder} cannot be read ({reason}); get its files again, or save the model again with diffusers' "
            "save_pretrained"
        ) from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers' own bar out of our commands' output."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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
    whole = folder.parent if Path(name).exists() else name  # no pickle is fetched from the hub
    convert = (
        f'python -c "from diffusers import StableDiffusionPipeline as P; '
        f"P.from_pretrained('{whole}').save_pretrained('{whole}-safetensors')\""
    )
    pickles = [path.name for path in folder.iterdir() if path.suffix in PICKLES]
    if pickles:
        raise TuningError(
            f"source {name}: {folder / pickles[0]} is a pickle, which can run code when it is read; "
            f"if you trust it, convert it once: {convert}"
        )
    raise TuningError(
        f"source {name}: no .safetensors file in {folder}; if it is there as a pickle, which can run code when it is read, "
        f"and you trust it, convert it once: {convert}"
    )
