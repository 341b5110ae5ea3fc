"""The page that `python -m benchmarks.quality.variants` writes: every variant, compared with the goals."""

import json
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

from engines import UserError

__all__ = ["BEFORE", "SLOWER", "markdown", "measured_before", "page"]

FASTER, LOST = 1.25, 2.0
"""Goals of `assembled` over `original`: how many times as fast, at least; and how many points of prompts fewer, at most."""
BEFORE = ", before distillation"
"""Suffix of the names of rows whose UNet is as it was cut out of the original."""
SLOWER, WON = 1.05, 0.5
"""Goals of `condconv` over `assembled`: its time, at most; and the share of those points that it wins back, at least."""


def markdown(result: Mapping[str, Any]) -> str:
    """The table of a result, as docs/variants.md shows it."""
    pixels = result["settings"]["pixels"]
    columns = ("UNet", "parameters", "MACs", "time at 64 px", f"time at {pixels} px", "prompts shown", "Frechet distance")
    lines = [columns, ("---",) * len(columns)]
    for name, row in result["rows"].items():
        variant, comma, rest = name.partition(",")
        if "parameters" in row:
            costs = (
                f"{row['parameters'] / 1e6:.2f} M",
                f"{row['macs'] / 1e6:.1f} M",
                _range(row["time"]),
                _range(row["time_large"]),
            )
            lines.append((f"`{variant}`{comma}{rest}", *costs, f"{100 * row['accuracy']:.1f} %", f"{row['frechet']:.2f}"))
        else:
            lines.append((name, *[""] * 5, f"{row['frechet']:.2f}"))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: its table, what its columns are, and its goals."""
    return _PAGE.format(table=markdown(result), goals=_goals(result["rows"], result["settings"]["pixels"]), **result["settings"])


def measured_before(path: Path) -> dict[str, Any]:
    """The figures in a file. Raises UserError where it holds none."""
    try:
        result: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} holds no figures ({error}); give --out with a file of them, or measure without --page"
        ) from error
    return result


def _range(ratios: Mapping[str, float]) -> str:
    return f"{ratios['median']:.2f} ({ratios['low']:.2f} to {ratios['high']:.2f})"


def _goals(rows: Mapping[str, Any], pixels: int) -> str:
    """Goals beside figures, by the medians of the table."""
    original, assembled, condconv = (rows[name] for name in ("original", "assembled", "condconv"))
    lost = 100 * (original["accuracy"] - assembled["accuracy"])
    small, large = (round(condconv[key]["median"] / assembled[key]["median"], 2) for key in ("time", "time_large"))
    sentences = [
        f"`assembled` was to be at least {FASTER} times as fast as `original`",
        f"and to show at most {LOST:g} points fewer of the prompts:",
        f"at 64 px it is {1 / assembled['time']['median']:.2f} times as fast, and it shows {_points(lost)}.",
        f"`condconv` was to take at most {SLOWER} times as long as `assembled`",
        f"and to win back {100 * WON:g} % of what that lost:",
        f"it takes {_longer(small)} at 64 px and {_longer(large)} at {pixels} px;",
        f"{_won(lost, 100 * (condconv['accuracy'] - assembled['accuracy']))}.",
        *([_REASON] if small > SLOWER else []),
        *_worse(rows),
    ]
    return fill(" ".join(sentences), 130, break_long_words=False, break_on_hyphens=False)


def _worse(rows: Mapping[str, Any]) -> list[str]:
    """The worth of pictures before distillation: goals say nothing where they are no worse."""
    pairs = [(before.partition(",")[0], rows[before]) for before in rows if before.endswith(BEFORE)]
    if not pairs:
        return []
    fewer = [f"`{name}` shows {_points(100 * (rows[name]['accuracy'] - before['accuracy']))}" for name, before in pairs]
    further = [f"{before['frechet']:.2f} in place of {rows[name]['frechet']:.2f}" for name, before in pairs]
    return [
        "Without distillation a pruned UNet has to be visibly worse, or these goals would prove nothing:",
        f"without it {' and '.join(fewer)} than with it, at Frechet distances of {' and '.join(further)}.",
    ]


def _points(lost: float) -> str:
    return "as many" if abs(lost) < 0.05 else f"{abs(lost):.1f} points {'fewer' if lost > 0 else 'more'}"


def _longer(ratio: float) -> str:
    return f"{ratio:.2f} times as long" + (f", {ratio - SLOWER:.2f} too much," if ratio > SLOWER else "")


def _won(lost: float, more: float) -> str:
    if lost < 0.05:
        return "`assembled` lost nothing, so there was nothing to win back"
    return f"of {lost:.1f} points lost it wins back {more:.1f}"


_REASON = (
    "At 64 px a convolution takes microseconds, and mixing its kernel is a few small operators beside it "
    "([what it costs](condconv.md#what-it-costs))."
)

_PAGE = """# The embedded model's UNets

{table}
MACs are of one row of the batch at 64 px. Times are the UNet's, one picture with guidance, relative to `original`: medians of
{rounds} interleaved rounds on ONNX Runtime's CPU provider, lowest and highest in brackets. Prompts shown: of {count} that
training never saw, by the rule reader, {steps} steps of DPM++, guidance {guidance:g}. Frechet distance: to {rendered} rendered
pictures in the network reader's features; the last row is that of {count} other rendered pictures, which is as low as it gets.
Before distillation `condconv` has no row: it is `assembled` before distillation, exactly, whatever its experts hold.

{goals}

![A row for each UNet, a column for each prompt](variants.png)

Made by `make table` (`python -m benchmarks.quality.variants`; with `--page`, from the figures of
[variants.json](../benchmarks/results/variants.json) alone).
"""
