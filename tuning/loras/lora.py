"""Which LoRA files are fused into a checkpoint, and how strongly: as a command names them, and as files that may be opened."""

import math
from dataclasses import dataclass
from pathlib import Path

from engines.support.files import expanded
from tuning.checkpoints.files import check_file
from tuning.checkpoints.weight_files import PICKLES
from tuning.errors import TuningError

__all__ = ["Lora"]

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Lora:
    """A LoRA's .safetensors file, and the factor of what it adds to the weights; 1 is what it was trained for."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Lora":
        """Read ``FILE`` or ``FILE:SCALE``. A file of that very name is meant before a scale is; its name may have colons in it.

        Raises:
            TuningError: what follows the file's name is no number.
        """
        head, colon, tail = text.rpartition(":")
        if not colon or expanded(text).exists():
            return cls(expanded(text))
        try:
            return cls(expanded(head), float(tail))
        except ValueError as error:
            if head.endswith(_SUFFIX):
                raise TuningError(
                    f"LoRA {text!r:.200}: its scale {tail!r:.40} is no number; write FILE or FILE:SCALE, such as {head:.100}:0.8"
                ) from error
            return cls(expanded(text))

    def __str__(self) -> str:
        return f"{self.path}:{self.scale!r}"

    def check(self) -> None:
        """Raise TuningError unless the scale is a finite number, and the file there and of the kind that is read."""
        if not math.isfinite(self.scale):
            raise TuningError(f"LoRA {self.path}: its scale is {self.scale}; give a finite number, such as 1")
        if self.path.suffix in PICKLES and self.path.is_file():
            raise TuningError(
                f"LoRA {self.path} is a pickle, which can run code when it is read; get it as a .safetensors file, or if you "
                'trust it, convert it once: python -c "import torch; from safetensors.torch import save_file; '
                f"save_file(torch.load('{self.path}', weights_only=True), '{self.path.with_suffix(_SUFFIX)}')\""
            )
        if self.path.is_dir():
            raise TuningError(f"LoRA {self.path} is a folder; name the .safetensors file in it")
        if not self.path.exists():
            raise TuningError(f"LoRA {self.path}: no such file; write FILE.safetensors or FILE.safetensors:SCALE")
        if self.path.suffix != _SUFFIX:
            raise TuningError(f"LoRA {self.path} is a file of another kind than {_SUFFIX}; only such are read")
        check_file(self.path)
