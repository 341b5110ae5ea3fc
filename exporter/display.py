"""A build's progress on the screen: a bar on a terminal, a line for each step elsewhere, or JSON for machines."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from exporter.progress import Progress, Step

__all__ = ["show_progress"]


@contextmanager
def show_progress(console: Console, *, as_json: bool) -> Iterator[Progress]:
    """What a build is to tell its steps."""
    if as_json:
        yield _json_lines(console)
    elif console.is_terminal:
        with _bar(console) as bar:
            task = bar.add_task("", total=None)
            yield lambda step: bar.update(task, completed=step.done, total=step.total, description=str(step))
    else:
        yield lambda step: console.print(_line(step), highlight=False, markup=False, soft_wrap=True)


def _line(step: Step) -> str:
    return f"[{step.done}/{'?' if step.total is None else step.total}] {step}"


def _bar(console: Console) -> Bar:
    return Bar(
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
    )


def _json_lines(console: Console) -> Progress:
    started = time.perf_counter()

    def write(step: Step) -> None:
        told = {**step._asdict(), "seconds": round(time.perf_counter() - started, 1)}
        console.out(json.dumps(told), highlight=False)

    return write
