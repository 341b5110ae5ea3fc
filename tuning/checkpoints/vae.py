"""Another VAE instead of a source's own: that of a diffusers folder, of a hub's repository, or of a single file."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tuning.checkpoints.configs import Extent
from tuning.checkpoints.files import read_json
from tuning.checkpoints.find_source import SD15, fetch, path_of
from tuning.checkpoints.folder import extent_of
from tuning.checkpoints.part_loaders import SKELETONS, is_tiny
from tuning.checkpoints.single_file import check_converted, vae_tensors
from tuning.checkpoints.source import check_part, library_weights, reading
from tuning.checkpoints.weight_files import find_weights
from tuning.checkpoints.weights import FileWeights, Weights, check_floating, mmap_safetensors, names_in, shapes_in, shapes_of
from tuning.errors import TuningError
from tuning.surgery.meta import on_meta

__all__ = ["Vae", "find_vae"]

_PREFIX = "first_stage_model."
_OF_KL = "down_block_types"
"""A setting that the configuration of an AutoencoderKL has, and that of an AutoencoderTiny has not."""
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Of an attention's matrices in diffusers before 0.17, and now."""


@dataclass(frozen=True)
class Vae(ABC):
    """A VAE; ``name`` is what the user gave."""

    name: str

    @abstractmethod
    def skeleton(self) -> nn.Module:
        """The VAE without weights: parameters on the meta device, in evaluation mode.

        Raises:
            TuningError: its configuration is none of a VAE.
        """

    @abstractmethod
    def weights(self) -> Weights:
        """Where its weights are. Raises TuningError where they are missing or others than the configuration's."""

    @abstractmethod
    def files(self) -> Iterator[Path]:
        """Every file that reading it depends on."""

    def check_fit(self, unet: Any, own: Path) -> None:
        """Raise TuningError unless its latents are those of a UNet, and as large as those of the VAE configured in ``own``."""
        config: Any = self.skeleton().config
        if config.latent_channels != unet.in_channels:
            raise TuningError(
                f"VAE {self.name}: its latents have {config.latent_channels} channels, and the source's UNet takes "
                f"{unet.in_channels}; give a VAE of Stable Diffusion 1.x or 2.x"
            )
        scale, wanted = len(config.block_out_channels) - 1, _config_in(own).get("block_out_channels")
        if isinstance(wanted, list) and scale != len(wanted) - 1:
            raise TuningError(
                f"VAE {self.name}: a latent of it is {2**scale} pixels wide, and one of the source's own VAE "
                f"{2 ** (len(wanted) - 1)}; give one that the source's UNet can be used with"
            )

    def note(self, own: Path) -> str | None:
        """A warning if its scale of latents is not that of the VAE configured in ``own``; else None."""
        vae: Any = self.skeleton()
        config = _config_in(own)
        wanted = config.get("scaling_factor", vae.config.scaling_factor)
        if is_tiny(vae) or _OF_KL not in config or vae.config.scaling_factor == wanted:
            return None
        return (
            f"VAE {self.name}: its scaling factor is {vae.config.scaling_factor}, and the source's own VAE has {wanted}; "
            "if pictures are grey or garish, it is one for another family of models"
        )


def _config_in(folder: Path) -> dict[str, Any]:
    """The configuration of a VAE; nothing where there is none."""
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


@dataclass(frozen=True)
class _FolderVae(Vae):
    """In ``folder``, as ``save_pretrained`` writes it."""

    folder: Path

    def skeleton(self) -> nn.Module:
        with _named(self.name), reading(self.name, self.folder):
            return SKELETONS["vae"](self.folder, extent_of(self.folder)).eval()

    def weights(self) -> Weights:
        with _named(self.name):
            check_part(self.name, self.folder.parent, self.folder.name)
            return library_weights(self.name, self.folder, "vae", self.skeleton(), None)

    def files(self) -> Iterator[Path]:
        yield from sorted((self.folder / "config.json", *find_weights(self.folder).all))


@dataclass(frozen=True)
class _FileVae(Vae):
    """In the .safetensors file ``path``: alone, or in a whole checkpoint; ``folder`` has its configuration, if it needs one."""

    path: Path
    folder: Path

    def skeleton(self) -> nn.Module:
        names = names_in(self.path)
        if any(name.startswith("encoder.layers.") for name in names):
            from diffusers import AutoencoderTiny

            with on_meta():
                tiny: nn.Module = AutoencoderTiny()
            return tiny.eval()
        if not any(name.removeprefix(_PREFIX).startswith(("encoder.down.", "encoder.down_blocks.")) for name in names):
            raise TuningError(
                f"VAE {self.path} holds no VAE: no tensor is called encoder.down*, {_PREFIX}encoder.down* or encoder.layers.*; "
                "give one in diffusers' or CompVis' layout, or a diffusers folder"
            )
        with _named(self.name), reading(self.name, self.folder):
            return SKELETONS["vae"](self.folder, Extent.of(shapes_in(self.path))).eval()

    def weights(self) -> Weights:
        module = self.skeleton()
        shapes = shapes_of(module)

        def open_file() -> dict[str, Tensor]:
            tensors = mmap_safetensors(self.path)
            if any(name.startswith(_PREFIX) for name in tensors):
                return vae_tensors({name: found for name, found in tensors.items() if name.startswith(_PREFIX)}, module)
            if any(name.startswith("encoder.down.") for name in tensors):
                return vae_tensors(tensors, module)
            return {_renamed(name): found for name, found in tensors.items()}

        check_floating(self.path, _PREFIX if any(name.startswith(_PREFIX) for name in names_in(self.path)) else "")
        check_converted(open_file, shapes, self._refuse)
        return FileWeights(str(self.path), shapes, open_file)

    def _refuse(self, reason: str) -> TuningError:
        return TuningError(
            f"VAE {self.path} is not what {self.folder} describes ({reason:.300}); give a diffusers folder with its config.json"
        )

    def files(self) -> Iterator[Path]:
        yield self.path
        yield self.folder / "config.json"


def _renamed(name: str) -> str:
    owner, _, kind = name.rpartition(".")
    place, _, last = owner.rpartition(".")
    return f"{place}.{_OLD_NAMES[last]}.{kind}" if last in _OLD_NAMES and place.endswith("attentions.0") else name


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say of errors that they are a VAE's, and not a source's."""
    try:
        yield
    except TuningError as error:
        reason = str(error)
        for prefix in (f"source {name}: ", f"VAE {name}: ", "source ", "unknown source ", "VAE ", f"{name!r}: "):
            reason = reason.removeprefix(prefix)
        raise TuningError(f"VAE {name}: {reason}") from error


def find_vae(name: str, own: Path) -> Vae:
    """Find a VAE.

    Args:
        name: a diffusers folder of a VAE or of a whole checkpoint, a hub id, or a .safetensors file with a VAE in it.
        own: the folder of the source's own VAE, whose configuration a file is taken to have; Stable Diffusion 1.5's where there
            is none, or another kind of VAE.

    Raises:
        TuningError: there is no such VAE, or its weights are pickled.
    """
    with _named(name):
        path = path_of(name)
        if path.suffix == ".safetensors":
            return _FileVae(name, path, own if _OF_KL in _config_in(own) else SD15 / "vae")
        folder = path if path.is_dir() else fetch(name)
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
        check_part(name, folder.parent, folder.name)
    return _FolderVae(name, folder)
