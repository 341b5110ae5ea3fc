"""The training loop that every training shares: bounded by steps or time, resumable to the same state, logged as JSON lines.

All randomness of a task comes from (seed, step, rank), never from a running generator, so a checkpoint needs no
generator state and a resumed run repeats what an unbroken one does.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from torch import Tensor, nn

from tuning.errors import TuningError
from tuning.optim import MuonAdamW
from tuning.state import State
from tuning.workers import Workers
from tuning.writing import write_text

__all__ = ["LoopSettings", "Task", "run_loop"]


class Task(Protocol):
    """What a training brings: what it trains, its loss, and what to measure and write along the way."""

    name: str
    module: nn.Module

    def loss(self, step: int, progress: float) -> dict[str, Tensor]:
        """Losses of batch number `step`; "loss" is the one that is minimised."""

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
    accumulate: int = 1  # batches whose gradients make one step
    log_every: int = 20  # steps
    validate_minutes: float = 5.0  # wall minutes between validations
    validate_every: int | None = None  # steps between validations, in place of minutes
    sample_every: int | None = None  # steps between sample pictures; None: with every validation
    save_minutes: float = 2.0  # wall minutes between checkpoints


def _reached(state: State, s: LoopSettings) -> float:
    """How much of the nearest bound is used up after this step, 0 to 1 and more."""
    shares = [
        (state.step + 1) / s.steps if s.steps else 0.0,
        state.cpu / 60 / s.minutes if s.minutes else 0.0,
        state.wall / 60 / s.wall_minutes if s.wall_minutes else 0.0,
    ]
    return max(shares)


def _factor(settings: LoopSettings, step: int, progress: float) -> float:
    """Learning rate as a share of its base: warm-up, plateau, linear fall to 0."""
    fall = min(1.0, max(0.0, (1 - progress) / settings.decay)) if settings.decay else 1.0
    return min(1.0, (step + 1) / max(1, settings.warmup)) * fall


class _Report:
    """The console line and the JSON lines of the first worker."""

    def __init__(self, name: str, log: Path | None, workers: Workers) -> None:
        self._console = Console(stderr=True)
        self._name, self._log, self._on = name, log, workers.first
        self._sums: dict[str, float] = {}
        self._count = 0

    def rewind(self, step: int) -> None:
        """Drops the lines of steps after `step`: a run goes on from there and writes them again.

        Raises TuningError for a log with anything else in it.
        """
        if self._on and self._log is not None and self._log.exists():
            lines = self._log.read_text().splitlines()
            whole = [line for line in lines if line.endswith("}")]  # a killed process may leave a part of one
            try:
                kept = [line for line in whole if json.loads(line)["step"] <= step]
            except (ValueError, KeyError, TypeError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise TuningError(f"{self._log} is damaged ({reason}): take the bad line out, or delete it, and go on") from error
            write_text(self._log, "".join(f"{line}\n" for line in kept))

    def add(self, losses: dict[str, float]) -> None:
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1

    def write(self, state: State, figures: dict[str, float] | None = None) -> None:
        values = figures or {name: total / max(1, self._count) for name, total in self._sums.items()}
        if figures is None:
            self._sums, self._count = {}, 0
        if not self._on:
            return
        line = {"stage": self._name, "step": state.step, "progress": round(state.progress, 4)}
        line |= {"cpu_minutes": round(state.cpu / 60, 2), "wall_minutes": round(state.wall / 60, 2)}
        line |= {name: float(f"{value:.5g}") for name, value in values.items()}
        if self._log is not None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a") as file:
                file.write(json.dumps(line) + "\n")
        words = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        done = f"{100 * state.progress:5.1f} %"
        self._console.print(f"[bold]{self._name}[/] {done}  step {state.step}  {words}", highlight=False)


class _Loop:
    """One run: the task, its state, and when which of the things beside training was done last."""

    def __init__(
        self,
        task: Task,
        settings: LoopSettings,
        workers: Workers,
        checkpoint: Path | None,
        report: _Report,
        sample: Callable[[int], None] | None,
    ) -> None:
        self.task, self.settings, self.workers, self.checkpoint, self.report = task, settings, workers, checkpoint, report
        self.sample = sample
        optimizer = MuonAdamW(task.module, lr=settings.lr, muon_lr=settings.muon_lr)
        self.state = State(task.name, task.module, optimizer, workers.scaler)
        if checkpoint is not None and checkpoint.exists():
            self.state.load(checkpoint)
        report.rewind(self.state.step)
        self.saved = self.validated = time.monotonic()

    def train(self) -> None:
        """One step: gradients of `accumulate` batches, averaged over the workers, then the update.

        A checkpoint that is due is written in between: its weights are known to give a loss that is finite.
        """
        state, settings = self.state, self.settings
        means = self._gradients()
        if not math.isfinite(means["loss"]):
            kept = self.checkpoint is not None and self.checkpoint.exists()
            advice = (
                "the last checkpoint is kept: lower the learning rates and start again to go on from it"
                if kept
                else "no checkpoint was written yet: lower the learning rates and start again"
            )
            raise TuningError(f"the loss of {self.task.name} is not finite at step {state.step}; {advice}")
        if time.monotonic() - self.saved > 60 * settings.save_minutes:
            self.save()
        factor = _factor(settings, state.step, state.progress)
        state.step += 1
        state.progress = means.pop("progress")
        state.optimizer.step(factor, settings.clip, self.workers.scaler)
        state.update_average(settings.ema)
        self.report.add(means)

    def _gradients(self) -> dict[str, float]:
        """Adds up the step's gradients; returns the losses, and the progress after it, as means over the workers."""
        state, accumulate = self.state, self.settings.accumulate
        sums: dict[str, Tensor] = {}
        for part in range(accumulate):
            losses = self.task.loss(state.step * accumulate + part, state.progress)
            self.workers.backward(losses["loss"] / accumulate)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / accumulate
        state.read_clocks()
        values = [_reached(state, self.settings), *torch.stack(list(sums.values())).tolist()]
        shared = self.workers.average(state.optimizer.parameters, values)
        return dict(zip(("progress", *sums), shared, strict=True))

    def save(self) -> None:
        """Writes the checkpoint, in the first worker."""
        if self.checkpoint is not None and self.workers.first:
            self.state.save(self.checkpoint)
        self.saved = time.monotonic()

    def look(self, *, measure: bool, draw: bool) -> dict[str, float]:
        """Validates, writes and draws on the first worker, with the averaged weights; returns the figures."""
        figures: dict[str, float] = {}
        if self.workers.first:
            with self.state.averaged():
                if measure:
                    figures = self.task.validate()
                    self.report.write(self.state, figures)
                    self.task.export()
                if draw and self.sample is not None:
                    self.sample(self.state.step)
        if measure:
            self.validated = time.monotonic()
        return figures

    def beside(self) -> None:
        """What falls due beside training after a step; the end of the run does the same once more."""
        settings, step, now = self.settings, self.state.step, time.monotonic()
        if step % settings.log_every == 0:
            self.report.write(self.state)
        if self.state.progress >= 1:
            return
        by_time = settings.validate_every is None and now - self.validated > 60 * settings.validate_minutes
        measure = by_time or (settings.validate_every is not None and step % settings.validate_every == 0)
        draw = measure if settings.sample_every is None else step % settings.sample_every == 0
        if measure or draw:
            self.look(measure=measure, draw=draw)


def run_loop(
    task: Task,
    settings: LoopSettings,
    *,
    workers: Workers,
    checkpoint: Path | None = None,
    log: Path | None = None,
    stop_at: Callable[[int], bool] | None = None,
    sample: Callable[[int], None] | None = None,
) -> dict[str, float] | None:
    """Trains until a bound is reached, going on from `checkpoint` where it exists; leaves averaged weights in the module.

    `stop_at(step)` ends the run early without finishing the stage: the checkpoint then allows going on. `sample(step)`
    draws pictures with the averaged weights. Returns the last validation figures (on the first worker; on others they are
    empty), or None when it was stopped early. Raises TuningError when no bound is given or the loss is not finite.
    """
    if not (settings.steps or settings.minutes or settings.wall_minutes):
        raise TuningError("training needs a bound: give --steps, --minutes or --wall-minutes")
    loop = _Loop(task, settings, workers, checkpoint, _Report(task.name, log, workers), sample)
    while loop.state.progress < 1 and not (stop_at and stop_at(loop.state.step)):
        loop.train()
        loop.beside()
    loop.save()
    figures = loop.look(measure=True, draw=True) if loop.state.progress >= 1 else None
    task.module.load_state_dict(loop.state.average)
    workers.wait()
    return figures
