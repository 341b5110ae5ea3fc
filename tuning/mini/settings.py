"""Settings of `mini`'s training; what ran is saved as JSON beside the weights."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuning.errors import TuningError
from tuning.training.loop import LoopSettings

__all__ = ["STAGES", "MiniSettings"]

STAGES = ("vae", "decoder", "diffusion")


def _stages() -> dict[str, LoopSettings]:
    return {
        "vae": LoopSettings(minutes=6, lr=2e-3, muon_lr=0.02, ema=0.998, validate_minutes=2),
        "decoder": LoopSettings(minutes=4, lr=1e-3, muon_lr=0.01, ema=0.998, validate_minutes=2),
        "diffusion": LoopSettings(minutes=75, lr=2e-3, muon_lr=0.02, decay=0.7, validate_minutes=8),
    }


@dataclass(frozen=True)
class MiniSettings:
    """Widths, batch sizes per process and the bounds of each stage. Minutes are CPU minutes per process."""

    stages: dict[str, LoopSettings] = field(default_factory=_stages)
    vae_batch: int = 16
    batch: int = 64
    pool: int = 8192  # latents each process keeps; the pool is rendered anew after `pool_epochs` passes
    pool_epochs: int = 4
    caption_dropout: float = 0.1
    validation: int = 512  # held-back scenes that validation measures losses on
    prompts: int = 64  # held-back prompts that validation samples pictures for
    vae_widths: tuple[int, ...] = (16, 32, 64, 64)
    unet_widths: tuple[int, ...] = (32, 64, 96, 96)
    text_width: int = 128
    text_layers: int = 3
    seed: int = 0

    def save(self, path: Path) -> None:
        """Writes the settings as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "MiniSettings":
        """Reads what `save` wrote. Raises TuningError when it can't."""
        try:
            values: dict[str, Any] = json.loads(path.read_text())
            # A stage of older settings that is none any more is passed over.
            stages = {name: stage for name, stage in values["stages"].items() if name in STAGES}
            values["stages"] = {name: LoopSettings(**stage) for name, stage in stages.items()}
            arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**arguments)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TuningError(f"{path} holds no settings ({error}): copy and edit models/mini/training/settings.json") from error
