"""The note in a UNet's folder of LoRAs that its weights contain already: a build fuses these into the text encoder alone."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from engines.bundle.digests import known_sha256
from engines.bundle.manifest import FusedLora
from engines.support.files import write_text
from engines.support.records import Record, explain
from tuning.checkpoints.files import read_json
from tuning.checkpoints.folder import LORAS_NOTE
from tuning.errors import TuningError
from tuning.loras.layers import LoraFile
from tuning.loras.lora import Lora

__all__ = ["describe", "not_fused_before", "read_note", "write_note"]


class _Note(Record):
    loras: tuple[FusedLora, ...] = ()


def describe(loras: Sequence[Lora]) -> tuple[FusedLora, ...]:
    """LoRAs with the hashes of their files."""
    return tuple(FusedLora(file=str(lora.path), scale=lora.scale, sha256=known_sha256(lora.path)) for lora in loras)


def write_note(folder: Path, loras: Sequence[FusedLora]) -> None:
    """Note the LoRAs in a UNet's folder; where there are none, an older note is removed."""
    if loras:
        write_text(folder / LORAS_NOTE, _Note(loras=tuple(loras)).model_dump_json(indent=1) + "\n")
    else:
        (folder / LORAS_NOTE).unlink(missing_ok=True)


def read_note(folder: Path) -> tuple[FusedLora, ...]:
    """The LoRAs that a UNet's folder notes. Raises TuningError for a damaged note."""
    path = folder / LORAS_NOTE
    if not path.exists():
        return ()
    try:
        return _Note.model_validate(read_json(path)).loras
    except ValidationError as error:
        raise TuningError(f"{path} is no note of LoRAs ({explain(error)}); make the UNet again") from error


def _is(lora: Lora, fused: FusedLora) -> bool:
    """Whether it is the same as the one that was fused, wherever its file lies now."""
    return lora.scale == fused.scale and known_sha256(lora.path) == fused.sha256


def not_fused_before(files: Sequence[LoraFile], folder: Path) -> list[LoraFile]:
    """Those of a build's LoRAs that are not in a UNet's folder yet.

    Raises:
        TuningError: a LoRA is in the UNet that the build does not name: the text encoder would go without it.
    """
    left = list(files)
    for before in read_note(folder):
        found = next((file for file in left if _is(file.lora, before)), None)
        if found is None:
            raise TuningError(
                f"LoRA {before.file} at {before.scale:g} is in the UNet {folder} already, and is not among those given; give "
                f"--lora {before.option} too: its part of the text encoder is fused when a bundle is built"
            )
        left.remove(found)
    return left
