"""A forecast of a run, before anything is built: its rows, what they take on disk, and about how long all of it takes."""

import shutil
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.end_to_end.rows import Row, Settings, bundle_folder
from benchmarks.peers import OURS
from engines.bundle.names import VAE_DECODER

__all__ = ["show"]

_BUILD_SECONDS = 25.0
"""Of a bundle, besides what goes with its size: tracing, on one core."""
_BUILD_SECONDS_PER_GB = 60.0
_START_SECONDS = 8.0
"""Of a process: imports."""
_ENVIRONMENT_SECONDS, _ENVIRONMENT_GB = 180.0, 2.5
_REACHED = 0.6
"""Of the speed of a matrix product, by a UNet on the CPU."""


def show(settings: Settings, rows: Sequence[Row], console: Console) -> None:
    """Print the rows, and what they will take."""
    from exporter.graph.checkpoint import open_source
    from exporter.graph.graph import DTYPE, load_graph

    graph = load_graph(open_source(settings.source, "original"), "original", DTYPE[settings.precision], settings.size)  # type: ignore[index]
    gigabytes = sum(unit.parameters for unit in graph.units) * DTYPE[settings.precision].itemsize / 1e9  # type: ignore[index]
    picture = _picture_seconds(graph, settings)
    table = Table("row", "engine", "pictures", title=f"{settings.source} on {settings.device}, {settings.precision}")
    for row in rows:
        table.add_row(row.name, row.engine or "-", row.reason or str(settings.rounds + 1))
    console.print(table)
    todo = [row for row in rows if not row.reason]
    builds = [variant for variant in settings.variants if not bundle_folder(settings, variant).exists()]
    apart = {row.peer.module for row in todo if row.peer.own_environment}
    subjects = {row.subject for row in todo}
    building = len(builds) * (_BUILD_SECONDS + gigabytes * _BUILD_SECONDS_PER_GB) + len(apart) * _ENVIRONMENT_SECONDS
    measuring = len(subjects) * 2 * _START_SECONDS
    if picture is not None:
        measuring += (len(todo) + len(subjects)) * (settings.rounds + 1) * picture
    disk = gigabytes * (len(builds) + any(row.peer is not OURS for row in todo)) + len(apart) * (_ENVIRONMENT_GB + gigabytes)
    free = shutil.disk_usage(settings.work if settings.work.exists() else ".").free / 1e9
    console.print(f"about {building / 60:.0f} minutes to build and install, {_minutes(measuring, picture)} to measure")
    console.print(f"about {disk:.1f} GB on disk, of {free:.0f} that are free; {len(subjects)} processes, at most two at a time")


def _minutes(seconds: float, picture: float | None) -> str:
    return f"{seconds / 60:.0f}" if picture is not None else f"more than {seconds / 60:.0f}"


def _picture_seconds(graph: Any, settings: Settings) -> float | None:
    """Of a whole picture on this CPU, from how fast it multiplies; None for a GPU."""
    if settings.device != "cpu":
        return None
    import torch

    macs = sum(unit.macs for unit in graph.unet_units)
    ends = sum(unit.macs for unit in graph.units if unit.name == VAE_DECODER)
    torch.set_num_threads(settings.threads)
    a = torch.randn(512, 512)
    a @ a
    started = time.perf_counter()
    for _ in range(20):
        a @ a
    speed = 20 * 512**3 / (time.perf_counter() - started) * _REACHED
    return float(settings.batch * (2 * settings.steps * macs + ends) / speed)
