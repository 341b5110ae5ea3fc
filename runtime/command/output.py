"""The output of ``python -m runtime``: which bundle runs, how far it is, which segments ran."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from engines.support.tables import fit
from runtime.execution.denoising import Callback
from runtime.execution.executor import StepRecord
from runtime.generation import Generation
from runtime.pipeline import Pipeline
from runtime.prepared import Prepared
from runtime.report.explain import listed
from runtime.report.kinds import kinds_of, segment_counts

__all__ = ["announce", "as_json", "progress", "show_kinds", "show_steps"]


def announce(pipeline: Pipeline, prepared: Prepared, folder: Path) -> str:
    """The line that comes before a call: the bundle, which may have been chosen by its date, and the request."""
    manifest, request = pipeline.manifest, prepared.request
    seeds = f"seed {request.seeds[0]}" if len(request.seeds) == 1 else f"{len(request.seeds)} seeds from {min(request.seeds)}"
    return (
        f"bundle {folder} ({manifest.variant} UNet of {manifest.source}, {manifest.precision}, engine {pipeline.engine.name}): "
        f"plan {prepared.schedule.plan.name}, {request.steps} steps of {request.scheduler}, {seeds}"
    )


@contextmanager
def progress(console: Console, total: int, name: str) -> Iterator[Callback]:
    """A bar of a call's evaluations on a terminal: ``12/20 steps, 5.1 it/s``."""
    words = TextColumn("{task.description}{task.completed:.0f}/{task.total:.0f} steps, {task.fields[rate]} it/s")
    shown = console.is_terminal and not console.quiet
    with Progress(words, BarColumn(), TimeRemainingColumn(), console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(name and f"{name}: ", total=total, rate="-")
        started: list[float] = []

        def step(record: StepRecord, latents: Tensor) -> None:
            now = time.monotonic()
            started.append(now)
            # Of the steps after the first, which may have to wait for what is done once.
            rate = f"{(len(started) - 1) / (now - started[0]):.1f}" if len(started) > 1 and now > started[0] else "-"
            bar.update(task, completed=record.index + 1, rate=rate)

        yield step


def show_kinds(generation: Generation, segments: Mapping[str, int], console: Console) -> None:
    """Print a row for each kind of step: how many there were, what they ran, and how long."""
    kinds = kinds_of(generation.steps)
    table = Table(title=f"{len(generation.steps)} steps, {generation.seconds:.2f} s in all", box=SIMPLE)
    switches = len({kind.unet for kind in kinds}) > 1
    for name in (*(["UNet"] if switches else []), "kind", "steps", "ms each", "segments run", "inherited"):
        table.add_column(name, justify="right" if name in {"steps", "ms each"} else "left")
    for kind in kinds:
        numbers = str(kind.count), f"{kind.milliseconds:.1f}"
        names = kind.segments(segments[kind.unet]), listed(kind.inherited)
        table.add_row(*([kind.unet] if switches else []), kind.name, *numbers, *names)
    console.print(fit(table, console, ["inherited"]))
    swaps = [record for record in generation.steps if record.swap_seconds]
    if swaps:
        told = ", ".join(f"{1000 * record.swap_seconds:.1f} ms before step {record.index}" for record in swaps)
        console.print(f"UNets were swapped, which took {told}", soft_wrap=True)


def show_steps(generation: Generation, segments: Mapping[str, int], console: Console) -> None:
    """Print a row for each step: the segments that ran, given how many each UNet has, and the features inherited."""
    table = Table(title=f"{len(generation.steps)} steps, {generation.seconds:.2f} s in all", box=SIMPLE)
    swapped = any(record.swap_seconds for record in generation.steps)
    switches = len({record.unet for record in generation.steps}) > 1
    words = *(["UNet"] if switches else []), "kind", "segments run", "inherited"
    for name in ("step", "timestep", *(["swap ms"] if swapped else []), "ms", *words):
        table.add_column(name, justify="left" if name in words else "right")
    for record in generation.steps:
        swap = f"{1000 * record.swap_seconds:.1f}" if record.swap_seconds else ""
        numbers = str(record.index), f"{record.timestep:.0f}", *([swap] if swapped else []), f"{1000 * record.seconds:.1f}"
        ran = listed(record.ran, segments[record.unet])
        table.add_row(*numbers, *([record.unet] if switches else []), record.kind, ran, listed(record.inherited))
    console.print(fit(table, console, ["inherited", "timestep"]))


def as_json(
    generation: Generation, pipeline: Pipeline, folder: Path, paths: Sequence[Path], compared: Mapping[str, Any] | None
) -> dict[str, Any]:
    """All that is known of a call, in JSON's terms."""
    segments = segment_counts(pipeline.networks)
    return {
        "engine": pipeline.engine.name,
        "folder": str(folder),
        "pictures": [{"path": str(path), **generation.made_from(number)} for number, path in enumerate(paths)],
        "seconds": round(generation.seconds, 4),
        "kinds": [
            {
                "unet": kind.unet,
                "kind": kind.name,
                "steps": list(kind.steps),
                "segments": list(kind.ran),
                "of": segments[kind.unet],
                "inherited": list(kind.inherited),
                "milliseconds": round(kind.milliseconds, 3),
            }
            for kind in kinds_of(generation.steps)
        ],
        "not_read": list(generation.unread),
        **({"compared": dict(compared)} if compared else {}),
    }
