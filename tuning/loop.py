"""The training loop that every stage shares: bounded by steps or time, resumable to the same state, logged as JSON lines.

All randomness of a task comes from (seed, step, rank), never from a running generator, so a checkpoint needs no
generator state and a resumed run repeats what an unbroken one does.
"""

import json
import math
import os
import pickle
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor, nn

from tuning.errors import TuningError
from tuning.optim import MuonAdamW
from tuning.workers import Workers

__all__ = ["LoopSettings", "Task", "generator", "run_loop"]


class Task(Protocol):
    """What a stage brings: what it trains, its loss, and what to measure and write along the way."""

    name: str
    module: nn.Module

    def loss(self, step: int, progress: float) -> dict[str, Tensor]:
        """Losses of one step; "loss" is the one that is minimised."""

    def validate(self) -> dict[str, float]:
        """Figures of the module as it is now; called with the averaged weights in place."""

    def export(self) -> None:
        """Writes the module as it is now; called with the averaged weights in place."""


@dataclass(frozen=True)
class LoopSettings:
    """Bounds (at least one; the first reached ends the run), learning rates and intervals.

    Learning rates rise over `warmup` steps, stay, and fall to 0 over the last `decay` share of the bound.
    """

    steps: int | None = None
    minutes: float | None = None  # CPU minutes of each process
    wall_minutes: float | None = None
    lr: float = 2e-3
    muon_lr: float = 0.02
    warmup: int = 100
    decay: float = 1.0
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    log_every: int = 20
    validate_minutes: float = 5.0  # wall minutes between validations
    save_minutes: float = 2.0  # wall minutes between checkpoints


def generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """A generator for one step of one worker."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 64 + rank)


class _State:
    """Everything that a checkpoint holds."""

    def __init__(self, task: Task, settings: LoopSettings) -> None:
        self.task, self.settings = task, settings
        self.optimizer = MuonAdamW(task.module, lr=settings.lr, muon_lr=settings.muon_lr)
        self.average = {k: v.detach().clone() for k, v in task.module.state_dict().items()}
        self.step, self.progress = 0, 0.0
        self.cpu, self.wall = 0.0, 0.0

    def update_average(self) -> None:
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        for key, value in self.task.module.state_dict().items():
            if value.is_floating_point():
                self.average[key].lerp_(value, 1 - decay)

    @contextmanager
    def averaged(self) -> Any:
        """The module holds the averaged weights inside."""
        current = {k: v.detach().clone() for k, v in self.task.module.state_dict().items()}
        self.task.module.load_state_dict(self.average)
        try:
            yield
        finally:
            self.task.module.load_state_dict(current)

    def save(self, path: Path) -> None:
        state = {
            "module": self.task.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
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
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.task.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average = state["average"]
        except (OSError, EOFError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
            raise TuningError(
                f"{path} is no checkpoint of this {self.task.name} ({_line(error)}): delete it to start the stage anew"
            ) from error
        for name, value in state["counters"].items():
            setattr(self, name, value)


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:120]


def _reached(state: _State, cpu: float, wall: float) -> float:
    """How much of the nearest bound is used up, 0 to 1 and more."""
    s = state.settings
    shares = [
        state.step / s.steps if s.steps else 0.0,
        cpu / 60 / s.minutes if s.minutes else 0.0,
        wall / 60 / s.wall_minutes if s.wall_minutes else 0.0,
    ]
    return max(shares)


def _factor(settings: LoopSettings, step: int, progress: float) -> float:
    """Learning rate as a share of its base: warm-up, plateau, linear fall to 0."""
    fall = min(1.0, max(0.0, (1 - progress) / settings.decay)) if settings.decay else 1.0
    return min(1.0, (step + 1) / max(1, settings.warmup)) * fall


def _finite(losses: dict[str, Tensor], state: _State) -> None:
    if not math.isfinite(float(losses["loss"].detach())):
        raise TuningError(
            f"the loss of {state.task.name} is not finite at step {state.step}; the last checkpoint is kept: "
            "lower the learning rates and start again to go on from it"
        )


class _Report:
    """The console line and the JSON lines of the first worker."""

    def __init__(self, task: Task, log: Path | None, workers: Workers) -> None:
        self._console = Console(stderr=True)
        self._task, self._log, self._on = task, log, workers.first
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach())
        self._count += 1

    def write(self, state: _State, figures: dict[str, float] | None = None) -> None:
        values = figures or {name: total / max(1, self._count) for name, total in self._sums.items()}
        if figures is None:
            self._sums, self._count = {}, 0
        if not self._on:
            return
        line = {"stage": self._task.name, "step": state.step, "progress": round(state.progress, 4)}
        line |= {"cpu_minutes": round(state.cpu / 60, 2), "wall_minutes": round(state.wall / 60, 2)}
        line |= {name: float(f"{value:.5g}") for name, value in values.items()}
        if self._log is not None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a") as file:
                file.write(json.dumps(line) + "\n")
        words = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        done = f"{100 * state.progress:5.1f} %"
        self._console.print(f"[bold]{self._task.name}[/] {done}  step {state.step}  {words}", highlight=False)


def run_loop(
    task: Task,
    settings: LoopSettings,
    *,
    workers: Workers,
    checkpoint: Path | None = None,
    log: Path | None = None,
    stop_at: Callable[[int], bool] | None = None,
) -> dict[str, float]:
    """Trains until a bound is reached, going on from `checkpoint` where it exists; leaves averaged weights in the module.

    `stop_at(step)` ends the run early without finishing the stage: the checkpoint then allows going on. Returns the last
    validation figures. Raises TuningError when no bound is given or the loss is not finite.
    """
    if not (settings.steps or settings.minutes or settings.wall_minutes):
        raise TuningError("training needs a bound: give --steps, --minutes or --wall-minutes")
    state, report = _State(task, settings), _Report(task, log, workers)
    if checkpoint is not None and checkpoint.exists():
        state.load(checkpoint)
    cpu0, wall0 = time.process_time() - state.cpu, time.monotonic() - state.wall
    saved = validated = time.monotonic()
    while state.progress < 1 and not (stop_at and stop_at(state.step)):
        losses = task.loss(state.step, state.progress)
        _finite(losses, state)
        losses["loss"].backward()
        state.cpu, state.wall = time.process_time() - cpu0, time.monotonic() - wall0
        factor = _factor(settings, state.step, state.progress)
        state.step += 1
        progress = _reached(state, state.cpu, state.wall)
        state.progress = workers.average_gradients(state.optimizer.parameters, progress)
        nn.utils.clip_grad_norm_(state.optimizer.parameters, settings.clip)
        state.optimizer.step(factor)
        state.update_average()
        report.add(losses)
        now = time.monotonic()
        if state.step % settings.log_every == 0:
            report.write(state)
        if workers.first and checkpoint is not None and now - saved > 60 * settings.save_minutes:
            state.save(checkpoint)
            saved = now
        if workers.first and now - validated > 60 * settings.validate_minutes:
            with state.averaged():
                report.write(state, task.validate())
                task.export()
            validated = time.monotonic()
    if checkpoint is not None and workers.first:
        state.save(checkpoint)
    task.module.load_state_dict(state.average)
    figures: dict[str, float] = {}
    if workers.first and state.progress >= 1:
        figures = task.validate()
        report.write(state, figures)
        task.export()
    workers.wait()
    return figures
