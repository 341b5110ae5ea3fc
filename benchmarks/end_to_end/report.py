"""A run's figures as a table on the terminal, as Markdown, CSV and JSON."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.end_to_end.figures import Figures, fault
from benchmarks.machine import machine
from engines.support.files import write_text

__all__ = ["COLUMNS", "markdown", "terminal_table", "write_all"]

COLUMNS = (
    "row",
    "engine",
    "s/picture",
    "p95",
    "pictures/s",
    "times as fast",
    "UNet s",
    "text s",
    "VAE s",
    "MACs",
    "eff.",
    "dB",
    "off",
    "MB",
    "load s",
)
_SHORT = ("row", "engine", "s/picture", "times as fast", "dB")
"""Columns that fit a terminal of 80."""


def _cells(figures: Figures) -> dict[str, str]:
    cells = {"row": figures["name"], "engine": figures["engine"] if figures["variant"] else "-"}
    if "reason" in figures:
        return cells
    same = "same" if figures["identical"] and figures["psnr"] is None else None
    return cells | {
        "s/picture": f"{figures['p50']:.3f}",
        "p95": f"{figures['p95']:.3f}",
        "pictures/s": _number(figures.get("pictures_per_second"), ".3f"),
        "times as fast": f"{figures['ratio']:.2f} ({figures['ratio_low']:.2f} to {figures['ratio_high']:.2f})",
        "UNet s": f"{figures['unet_seconds']:.3f}",
        "text s": f"{figures['text_seconds']:.3f}",
        "VAE s": f"{figures['vae_seconds']:.3f}",
        "MACs": _number(figures.get("macs_ratio"), ".3f"),
        "eff.": _number(figures.get("efficiency"), ".2f"),
        "dB": ("WRONG " if fault(figures) else "") + (same or _number(figures["psnr"], ".1f")),
        "off": _number(figures.get("deviation"), ".1e"),
        "MB": _number(figures["device_mb"] or figures["peak_mb"], ".0f"),
        "load s": _number(figures["load_seconds"], ".1f"),
    }


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def terminal_table(found: Sequence[Figures], width: int) -> Table:
    """The table; in a narrow terminal fewer columns, never cut figures."""
    columns = COLUMNS if width >= 140 else _SHORT
    table = Table(title="a picture from prompt to pixels; times as fast as original full of the engine, median (least to most)")
    for column in columns:
        table.add_column(column, justify="left" if column in {"row", "engine"} else "right", overflow="fold")
    for figures in found:
        if "reason" not in figures:
            table.add_row(*(_cells(figures)[column] for column in columns))
    return table


def _title(figures: Figures) -> str:
    return f"{figures['name']}, {figures['engine']}" if figures["variant"] else str(figures["name"])


def markdown(found: Sequence[Figures]) -> str:
    """The table for a document, and below it what is wrong with rows, and the rows that are not in it, with the reasons."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * 2}{'---:|' * (len(COLUMNS) - 2)}"]
    lines += [f"| {' | '.join(_cells(one)[name] for name in COLUMNS)} |" for one in found if "reason" not in one]
    left = [f"- {_title(one)}: {one[why]}" for one in found for why in ("reason", "fault") if why in one]
    return "\n".join([*lines, "", *left, *_peers_versions(found)]) + "\n"


def _peers_versions(found: Sequence[Figures]) -> list[str]:
    """A line for each peer: the versions in its own process, which may live in an environment of its own."""
    peers = [one for one in found if "versions" in one and not one["variant"]]
    return [f"- {one['name']}: {', '.join(' '.join(pair) for pair in one['versions'].items())}" for one in peers]


def _csv(found: Sequence[Figures]) -> str:
    """A line for each row; kinds of step are columns of their own."""
    lines = [_flat(figures) for figures in found]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)))
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(figures: Figures) -> Figures:
    line = {name: value for name, value in figures.items() if name not in {"steps", "versions"}}
    for kind, step in figures.get("steps", {}).items():
        line |= {f"{kind}_steps": step["count"], f"{kind}_step_seconds": step["seconds"]}
    return line


def write_all(out: Path, name: str, settings: dict[str, Any], found: Sequence[Figures], card: dict[str, str]) -> list[Path]:
    """Write JSON, CSV and Markdown; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    whole = {"settings": settings, "rows": list(found), "card": card, **machine()}
    texts = {"json": json.dumps(whole, indent=1, default=str) + "\n", "csv": _csv(found), "md": markdown(found)}
    for suffix, text in texts.items():
        write_text(out / f"{name}.{suffix}", text)
    return [out / f"{name}.{suffix}" for suffix in texts]
