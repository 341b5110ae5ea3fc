"""How far a file of prompts is: a bar on a terminal, and elsewhere a line now and then."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Shown", "show_progress"]

_EVERY = 30.0
"""Seconds between two lines."""


class Shown:
    """Takes the number of lines that are done; ``there`` are those that took no time."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._started = self._told = time.monotonic()

    def update(self, done: int, there: int) -> None:
        """So many lines are done."""

    def line(self, done: int, there: int) -> str | None:
        """The line to print now; None where one was printed a short while ago."""
        now = time.monotonic()
        if now - self._told < _EVERY:
            return None
        self._told, made = now, done - there
        left = "-" if not made else str(timedelta(seconds=round((now - self._started) / made * (self.total - done))))
        return f"{done}/{self.total} lines, {left} left"


@contextmanager
def show_progress(console: Console, total: int) -> Iterator[Shown]:
    """Show how far it is, as ``Shown.update`` is told."""
    shown = Shown(total)
    if not console.is_terminal or console.quiet:

        def print_line(done: int, there: int) -> None:
            if told := shown.line(done, there):
                console.print(told, soft_wrap=True)

        shown.update = print_line  # type: ignore[method-assign]
        yield shown
        return
    columns = MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, speed_estimate_period=300) as bar:
        task = bar.add_task("", total=total)
        shown.update = lambda done, there: bar.update(task, completed=done)  # type: ignore[method-assign]
        yield shown
