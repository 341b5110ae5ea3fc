"""How far a search is, in steps of the whole UNet for all its pictures, and how long the rest will take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["SearchProgress", "duration"]


class SearchProgress:
    """A bar on a terminal, and elsewhere a line for each stage. Work is counted in steps of the whole UNet for all pictures."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %, left:"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task = self._bar.add_task("", total=None)
        self.seconds_a_step = 0.0
        """As far as it has been measured."""

    @contextmanager
    def stage(self, words: str, work: float) -> Iterator[None]:
        """A part of the search, which takes about so much work at most; it says beforehand how long that is."""
        left = f", about {duration(work * self.seconds_a_step)} at most" if self.seconds_a_step else ""
        self.say(f"{words}{left}")
        self._bar.reset(self._task, total=work, description=words)
        with self._bar:
            yield

    @contextmanager
    def timed(self, work: float) -> Iterator[None]:
        """Work by which the time of the rest is estimated."""
        started = time.perf_counter()
        yield
        self.seconds_a_step = (time.perf_counter() - started) / work

    def did(self, work: float) -> None:
        """Some work is done."""
        self._bar.advance(self._task, work)

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """A time as people say it: ``40 s``, ``3 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
