"""The GPU check's tables."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.found import Found, Memory, Row, TextAndVae

__all__ = ["show_found"]


def _text(value: float | None, form: str = ".2f", scale: float = 1.0) -> str:
    return "-" if value is None else format(scale * value, form)


def show_found(console: Console, title: str, found: Found) -> None:
    """All that a stage has found, under its title."""
    if found.is_empty:
        return
    console.print(title, style="bold", highlight=False)
    for name, tests in found.tests.items():
        counts = f"{tests.passed} passed, {len(tests.failed)} failed, {len(tests.skipped)} skipped, {tests.seconds:.0f} s"
        console.print(f"tests marked {name}: {counts}", highlight=False)
    if found.rows:
        _show_rows(console, found.rows)
    if found.ends:
        _show_text_and_vae(console, found.ends)
    if found.memory:
        _show_memory(console, found.memory)
    if found.baselines:
        _show_baselines(console, found.baselines)
    for name, seconds in found.starts.items():
        console.print(f"second start: {name}: {json.dumps(seconds)}", highlight=False, soft_wrap=True, markup=False)


def _show_rows(console: Console, rows: Sequence[Row]) -> None:
    """A line for each plan on each engine."""
    columns = "engine", "precision", "plan", "error", "graphs: error", "ms", "graphs: ms", "first s", "pictures/s"
    table = Table(*columns, "MB planned", "held", "peak", "device", box=SIMPLE)
    for row in rows:
        first = row.first_seconds if row.graphs_first_seconds is None else row.graphs_first_seconds
        rate = 1 / row.picture_seconds if row.picture_seconds else None
        sizes = row.planned_bytes, row.features_bytes, row.peak_bytes, row.device_bytes
        table.add_row(
            row.engine, row.precision, row.plan, _text(row.error, ".1e"), _text(row.graphs_error, ".1e"),
            _text(row.milliseconds), _text(row.graphs_milliseconds), _text(first), _text(rate),
            *(_text(size, ".1f", 1e-6) for size in sizes),
        )  # fmt: skip
    console.print(table)


def _show_text_and_vae(console: Console, ends: Mapping[str, TextAndVae]) -> None:
    """Print the times of text encoder and VAE decoder, and the kernels of a full step."""
    table = Table("engine", "text encoder ms", "VAE decoder ms", "kernels of a full step", box=SIMPLE)
    for name, one in ends.items():
        table.add_row(name, _text(one.text_milliseconds), _text(one.vae_milliseconds), _text(one.kernels, ".0f"))
    console.print(table)


def _show_memory(console: Console, memory: Mapping[str, Memory]) -> None:
    """The memory of each engine beside features."""
    table = Table("engine", "MB of the UNet's files", "scratch", "of the device", box=SIMPLE)
    for name, one in memory.items():
        sizes = (one.weights_bytes, one.scratch_bytes, one.device_bytes)
        table.add_row(name, *(_text(size, ".1f", 1e-6) for size in sizes))
    console.print(table)


def _show_baselines(console: Console, baselines: Sequence[Mapping[str, Any]]) -> None:
    """Diffusers' own pipeline, in several ways."""
    table = Table("diffusers", "UNet steps ms", "pictures/s", "first s", "why not", box=SIMPLE)
    for one in baselines:
        rate = 1 / one["picture_seconds"] if one.get("picture_seconds") else None
        table.add_row(
            one["name"], _text(one.get("milliseconds")), _text(rate), _text(one.get("first_seconds")), one.get("reason", "")
        )
    console.print(table)
