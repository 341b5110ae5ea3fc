"""A build's progress on the screen: a bar on a terminal, a line for each step elsewhere, or JSON for machines."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from exporter.segments.progress import Progress, Step

__all__ = ["show_progress"]


@contextmanager
def show_progress(console: Console, *, as_json: bool) -> Iterator[Progress]:
    """Yield the function that a build reports its steps to; it shows them as a bar, lines or JSON."""
    if as_json:
        yield _json_lines(console)
    elif console.is_terminal:
        with _bar(console) as bar:
            task = bar.add_task("", total=None, ends=None)

            def update(step: Step) -> None:
                ends = None if step.seconds_left is None else time.monotonic() + step.seconds_left
                bar.update(task, completed=step.done, total=step.total, description=str(step), ends=ends)

            yield update
    else:
        yield lambda step: console.print(_line(step), highlight=False, markup=False, soft_wrap=True)


def _line(step: Step) -> str:
    return f"[{step.done}/{'?' if step.total is None else step.total}] {step}"


class TimeLeftColumn(ProgressColumn):
    """The time left by the build's own estimate: rich's is one of steps, and knows nothing where few are done in a while."""

    def render(self, task: Task) -> Text:
        """Hours, minutes and seconds until the task's ``ends``."""
        ends = task.fields["ends"]
        seconds = None if ends is None else round(max(ends - time.monotonic(), 0))
        over = seconds == 0 and task.total is not None and task.completed < task.total  # it takes longer than was thought
        left = "-:--:--" if seconds is None or over else str(timedelta(seconds=seconds))
        return Text(left, style="progress.remaining")


def _bar(console: Console) -> Bar:
    return Bar(
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeLeftColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
    )


def _json_lines(console: Console) -> Progress:
    started = time.perf_counter()

    def write(step: Step) -> None:
        told = {**step._asdict(), "seconds": round(time.perf_counter() - started, 1)}
        console.out(json.dumps(told), highlight=False)

    return write
