"""The training loop that every training shares: bounded by steps or time, resumable to the same state, logged as JSON lines.

All randomness of a task comes from (seed, step, rank), never from a running generator, so a checkpoint needs no
generator state and a resumed run repeats what an unbroken one does.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from tuning.errors import TuningError
from tuning.training.distributed import Workers
from tuning.training.optim import MuonAdamW
from tuning.training.report import Report
from tuning.training.state import State

__all__ = ["LoopSettings", "Task", "run_loop"]


class Task(Protocol):
    """One training: the module, its loss, and what to measure and write along the way."""

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


class _Loop:
    """One run: the task, its state, and when which of the things beside training was done last."""

    def __init__(
        self,
        task: Task,
        settings: LoopSettings,
        workers: Workers,
        checkpoint: Path | None,
        report: Report,
        sample: Callable[[int], None] | None,
    ) -> None:
        self.task, self.settings, self.workers, self.checkpoint, self.report = task, settings, workers, checkpoint, report
        self.sample = sample
        optimizer = MuonAdamW(task.module, lr=settings.lr, muon_lr=settings.muon_lr)
        self.state = State(task.name, task.module, optimizer, workers.scaler)
        if checkpoint is not None and checkpoint.exists():
            self.state.load(checkpoint)
        report.rewind(self.state)
        self.saved = self.validated = time.monotonic()
        self.trained = self.spoilt = False

    def train(self) -> None:
        """One step: gradients of `accumulate` batches, averaged over the workers, then the update.

        A checkpoint that is due is written in between: its weights are known to give a loss that is finite.
        """
        state, settings = self.state, self.settings
        means = self._gradients()
        self._check(means["loss"], means.pop("spoilt"))
        if time.monotonic() - self.saved > 60 * settings.save_minutes:
            self.save()
        factor = _factor(settings, state.step, state.progress)
        state.step += 1
        state.progress = means.pop("progress")
        state.optimizer.step(factor, settings.clip, self.workers.scaler)
        state.update_average(settings.ema)
        self.report.add(means)
        self.trained = True

    def _check(self, loss: float, spoilt: float) -> None:
        """Raises TuningError, in every worker alike, when the loss or what the first worker measured is not finite."""
        if math.isfinite(loss) and not spoilt:
            return
        state, name = self.state, self.task.name
        if state.step == 0:
            raise TuningError(
                f"the loss of {name} is not finite before any training: check the weights it starts from, and the data"
            )
        kept = self.checkpoint is not None and self.checkpoint.exists()
        advice = (
            "the last checkpoint is kept: lower the learning rates and start again to resume from it"
            if kept
            else "no checkpoint was written yet: lower the learning rates and start again"
        )
        what = "validation loss" if spoilt else "loss"
        raise TuningError(f"the {what} of {name} is not finite at step {state.step}; {advice}")

    @torch.no_grad()
    def check_finite(self) -> None:
        """Raises TuningError unless the last update left weights that give a finite loss, on the batch that made it."""
        state, loss = self.state, 0.0
        if self.trained:
            loss = float(self.task.loss(state.step * self.settings.accumulate - 1, state.progress)["loss"])
        self._check(*self.workers.average((), [loss, float(self.spoilt)]))

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
        values = [_reached(state, self.settings), float(self.spoilt), *torch.stack(list(sums.values())).tolist()]
        shared = self.workers.average(state.optimizer.parameters, values)
        return dict(zip(("progress", "spoilt", *sums), shared, strict=True))

    def save(self) -> None:
        """Writes the checkpoint, in the first worker."""
        if self.checkpoint is not None and self.workers.first:
            self.state.save(self.checkpoint)
        self.saved = time.monotonic()

    def evaluate(self, *, measure: bool, draw: bool) -> dict[str, float]:
        """Validates, writes and draws on the first worker, with the averaged weights; returns the figures.

        Of figures that are not finite nothing is written; all workers hear of it with the next loss.
        """
        figures: dict[str, float] = {}
        if self.workers.first:
            with self.state.averaged():
                if measure:
                    figures = self.task.validate()
                    self.spoilt = not all(map(math.isfinite, figures.values()))
                if measure and not self.spoilt:
                    self.report.write(self.state, figures)
                    self.task.export()
                if draw and not self.spoilt and self.sample is not None:
                    self.sample(self.state.step)
        if measure:
            self.validated = time.monotonic()
        return figures

    def finish(self) -> dict[str, float] | None:
        """Does what is due when training ends or pauses; returns the last figures, or None when it pauses.

        The checkpoint comes last, when the weights that it is to hold are known to give finite losses.
        """
        figures = None
        if self.state.progress >= 1:
            self.report.finish(self.state)
            figures = self.evaluate(measure=True, draw=True)
        self.check_finite()
        self.save()
        return figures

    def periodic(self) -> None:
        """Logs, validates and draws where that is due after a step; the end of the run does the same once more."""
        settings, step, now = self.settings, self.state.step, time.monotonic()
        if step % settings.log_every == 0:
            self.report.write(self.state)
        if self.state.progress >= 1:
            return
        by_time = settings.validate_every is None and now - self.validated > 60 * settings.validate_minutes
        measure = by_time or (settings.validate_every is not None and step % settings.validate_every == 0)
        draw = measure if settings.sample_every is None else step % settings.sample_every == 0
        if measure or draw:
            self.evaluate(measure=measure, draw=draw)


def run_loop(
    task: Task,
    settings: LoopSettings,
    *,
    workers: Workers,
    checkpoint: Path | None = None,
    log: Path | None = None,
    stop_at: Callable[[int], bool] | None = None,
    sample: Callable[[int], None] | None = None,
    measure_first: bool = False,
) -> dict[str, float] | None:
    """Trains until a bound is reached, resuming from `checkpoint` where it exists; leaves averaged weights in the module.

    `stop_at(step)` ends the run early without finishing the stage: the checkpoint then allows resuming. `sample(step)`
    draws pictures with the averaged weights. `measure_first` validates once before the first step. Returns the last
    validation figures (on the first worker; on others they are empty), or None when it was stopped early.

    Raises TuningError when no bound is given, or when a loss, in training or in validation, is not finite: the checkpoint
    is then still the last one whose weights gave a finite loss.
    """
    if not (settings.steps or settings.minutes or settings.wall_minutes):
        raise TuningError("training needs a bound: give --steps, --minutes or --wall-minutes")
    loop = _Loop(task, settings, workers, checkpoint, Report(task.name, log, workers), sample)
    if measure_first and loop.state.step == 0:
        loop.evaluate(measure=True, draw=False)
    while loop.state.progress < 1 and not (stop_at and stop_at(loop.state.step)):
        loop.train()
        loop.periodic()
    figures = loop.finish()
    task.module.load_state_dict(loop.state.average)
    workers.wait()
    return figures
