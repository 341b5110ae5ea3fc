"""Everything that a training's checkpoint holds: weights, their average, both optimizers, and how far the run is."""

import math
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engines.support.files import atomic_file, remove_partials
from tuning.errors import TuningError
from tuning.training.optim import MuonAdamW

__all__ = ["State", "steps_in"]

_DAMAGED = (
    OSError, EOFError, RuntimeError, AttributeError, IndexError, KeyError, ValueError, TypeError, pickle.UnpicklingError,
)  # fmt: skip


class State:
    """A module under training, its average and optimizers, and how far the training is."""

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
        remove_partials(path)  # each is as large as the checkpoint
        try:
            with atomic_file(path) as temporary:
                torch.save(state, temporary)
        except (OSError, RuntimeError) as error:  # torch raises the latter on a full disk
            reason = error.strerror if isinstance(error, OSError) else "the disk may be full"
            kept = "the last checkpoint is kept" if path.exists() else "there is none yet"
            raise TuningError(f"can't write {path} ({reason}): {kept}; make room and start again to resume") from error

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
            for name, value in _counters(state).items():
                setattr(self, name, value)
        except _DAMAGED as error:
            raise TuningError(
                f"{path} is no checkpoint of this {self.name} ({_reason(error)}): delete it to start anew, "
                "or choose another folder"
            ) from error
        self._cpu0, self._wall0 = self._cpu0 - self.cpu, self._wall0 - self.wall


def steps_in(path: Path) -> int:
    """How many steps the training took whose checkpoint this is. Raises TuningError where that cannot be read."""
    try:
        return int(_counters(torch.load(path, map_location="cpu", weights_only=True, mmap=True))["step"])
    except _DAMAGED as error:
        raise TuningError(
            f"{path} is no checkpoint of a portion that is done ({_reason(error)}): delete {path.parent} to do it again"
        ) from error


def _counters(state: dict[str, Any]) -> dict[str, float]:
    """How far the run is, as a checkpoint says. Raises KeyError, TypeError or ValueError for anything but finite numbers."""
    counters = {name: state["counters"][name] for name in ("step", "progress", "cpu", "wall")}
    if type(counters["step"]) is not int or not all(math.isfinite(value) and value >= 0 for value in counters.values()):
        raise ValueError(f"counters that are not valid: {counters}")
    return counters


def _reason(error: Exception) -> str:
    pickled = isinstance(error, pickle.UnpicklingError)
    return "a damaged file, or a pickle of more than tensors and numbers" if pickled else _line(error)


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:120]
