"""Everything that a training's checkpoint holds: weights, their average, both optimizers, and how far the run is."""

import os
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from tuning.errors import TuningError
from tuning.optim import MuonAdamW

__all__ = ["State"]


class State:
    """A module under training with what goes on with it."""

    def __init__(self, name: str, module: nn.Module, optimizer: MuonAdamW, scaler: torch.amp.GradScaler | None) -> None:
        """`name` is what the training is called in messages."""
        self.name, self.module, self.optimizer, self.scaler = name, module, optimizer, scaler
        self.average = {k: v.detach().clone() for k, v in module.state_dict().items()}
        self.step, self.progress = 0, 0.0
        self.cpu, self.wall = 0.0, 0.0  # seconds of this process so far
        self._cpu0, self._wall0 = time.process_time(), time.monotonic()

    def read_clocks(self) -> None:
        """Brings `cpu` and `wall` up to now."""
        self.cpu, self.wall = time.process_time() - self._cpu0, time.monotonic() - self._wall0

    def update_average(self, decay: float) -> None:
        """Moves the average towards the weights; the first steps move it further."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        for key, value in self.module.state_dict().items():
            if value.is_floating_point():
                self.average[key].lerp_(value, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The module holds the averaged weights inside."""
        current = {k: v.detach().clone() for k, v in self.module.state_dict().items()}
        self.module.load_state_dict(self.average)
        try:
            yield
        finally:
            self.module.load_state_dict(current)

    def save(self, path: Path) -> None:
        """Writes a checkpoint of tensors and numbers, in one move. Raises TuningError when it can't."""
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "counters": {"step": self.step, "progress": self.progress, "cpu": self.cpu, "wall": self.wall},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial")
        try:
            torch.save(state, temporary)
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch raises the latter on a full disk
            temporary.unlink(missing_ok=True)
            raise TuningError(f"can't write {path} ({_line(error)}): the last checkpoint is kept; make room, go on") from error

    def load(self, path: Path) -> None:
        """Restores what `save` wrote. Raises TuningError for anything else; code in a pickle is never run."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            for key, value in self.average.items():
                value.copy_(state["average"][key])
            if self.scaler and state.get("scaler"):
                self.scaler.load_state_dict(state["scaler"])
            for name in ("step", "progress", "cpu", "wall"):
                setattr(self, name, state["counters"][name])
        except (OSError, EOFError, RuntimeError, KeyError, ValueError, TypeError, pickle.UnpicklingError) as error:
            pickled = isinstance(error, pickle.UnpicklingError)
            reason = "a damaged file, or a pickle of more than tensors and numbers" if pickled else _line(error)
            raise TuningError(
                f"{path} is no checkpoint of this {self.name} ({reason}): delete it to start anew, or choose another place"
            ) from error
        self._cpu0, self._wall0 = self._cpu0 - self.cpu, self._wall0 - self.wall


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:120]
