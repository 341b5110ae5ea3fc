"""A training's report: the line on the console, and the JSON lines of its metrics file."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from engines.support.files import write_text
from tuning.errors import TuningError
from tuning.training.distributed import Workers
from tuning.training.state import State

__all__ = ["Report"]


class Report:
    """The console line and the JSON lines of the first worker."""

    def __init__(self, name: str, log: Path | None, workers: Workers) -> None:
        self._console = Console(stderr=True)
        self._name, self._log, self._on = name, log, workers.first
        self._sums: dict[str, float] = {}
        self._count = 0

    def rewind(self, state: State) -> None:
        """Drops the lines that this run writes again: all after the state's step, and what a finished run measured at its end.

        Raises TuningError for a log with anything else in it.
        """
        if self._on and self._log is not None and self._log.exists():
            lines = self._log.read_text().splitlines()
            whole = [line for line in lines if line.endswith("}")]  # a killed process may leave a part of one
            try:
                kept = [line for line in whole if not self._again(json.loads(line), state)]
            except (ValueError, KeyError, TypeError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise TuningError(
                    f"{self._log} is damaged ({reason}): take the bad line out, or delete it, and start again"
                ) from error
            write_text(self._log, "".join(f"{line}\n" for line in kept))

    @staticmethod
    def _again(line: dict[str, Any], state: State) -> bool:
        """Whether a run that is resumed from this state writes this line again."""
        measured = state.step == 0 or (state.progress >= 1 and "loss" not in line)
        return bool(line["step"] >= state.step if measured else line["step"] > state.step)

    def add(self, losses: dict[str, float]) -> None:
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1

    def finish(self, state: State) -> None:
        """Writes the losses of the steps since the last line."""
        if self._count:
            self.write(state)

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
