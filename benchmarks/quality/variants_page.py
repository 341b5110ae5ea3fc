"""The page that `python -m benchmarks.quality.variants` writes: every variant, compared with the goals."""

import json
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

from engines import UserError

__all__ = ["BEFORE", "SLOWER", "markdown", "measured_before", "page"]

FASTER = 1.25
"""Goal of `assembled` over `original`: how many times as fast, at least."""
BEFORE = ", before distillation"
"""Suffix of the names of rows whose UNet is as it was cut out of the original."""
SLOWER, WON = 1.05, 0.5
"""Goals of `condconv` over `assembled`: its time, at most; and the share that it wins back of what that lost, at least."""


def markdown(result: Mapping[str, Any]) -> str:
    """The table of a result, as docs/variants.md shows it."""
    pixels = result["settings"]["pixels"]
    columns = (
        "UNet", "parameters", "MACs", "time at 128 px", f"time at {pixels} px", "concept, seen", "held back", "style, seen",
        "held back", "PSNR",
    )  # fmt: skip
    lines = [columns, ("---",) * len(columns)]
    for name, row in result["rows"].items():
        variant, comma, rest = name.partition(",")
        shown = [_share(row[part][measure]) for measure in ("concept_top1", "style") for part in ("seen", "held_back")]
        psnr = row["likeness"]["psnr"]
        costs = f"{row['parameters'] / 1e6:.2f} M", f"{row['macs'] / 1e6:.0f} M", _range(row["time"]), _range(row["time_large"])
        lines.append((f"`{variant}`{comma}{rest}", *costs, *shown, "" if psnr is None else f"{psnr:.1f} dB"))
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


def _share(figures: Mapping[str, float]) -> str:
    return f"{100 * figures['share']:.0f} % ({100 * figures['low']:.0f} to {100 * figures['high']:.0f})"


def _range(ratios: Mapping[str, float]) -> str:
    return f"{ratios['median']:.2f} ({ratios['low']:.2f} to {ratios['high']:.2f})"


def _goals(rows: Mapping[str, Any], pixels: int) -> str:
    """Goals beside figures, by the medians of the table."""
    assembled, condconv = rows["assembled"], rows["condconv"]
    lost, won = assembled["over_original"], condconv["over_assembled"]
    small, large = (round(condconv[key]["median"] / assembled[key]["median"], 2) for key in ("time", "time_large"))
    sentences = [
        f"`assembled` was to be at least {FASTER} times as fast as `original`:",
        f"at 128 px it is {1 / assembled['time']['median']:.2f} times as fast.",
        f"Against `original`, the pictures in which the reader finds the concept are {_points(lost)}.",
        f"`condconv` was to take at most {SLOWER} times as long as `assembled`",
        f"and to win back {100 * WON:g} % of what that lost:",
        f"it takes {_longer(small)} at 128 px and {_longer(large)} at {pixels} px.",
        f"Against `assembled`, its pictures with the concept are {_points(won)}: {_won(lost, won)}.",
        f"They are {_decibels(condconv, assembled)} those of `original`.",
        *_worse(rows),
    ]
    return fill(" ".join(sentences), 130, break_long_words=False, break_on_hyphens=False)


def _worse(rows: Mapping[str, Any]) -> list[str]:
    """The worth of pictures before distillation: goals say nothing where they are no worse."""
    pairs = [(before.partition(",")[0], rows[before]) for before in rows if before.endswith(BEFORE)]
    if not pairs:
        return []
    fewer = [f"`{name}` {_points(before['over_original'])}" for name, before in pairs]
    return [
        "Without distillation a pruned UNet has to be visibly worse, or these goals would prove nothing:",
        f"without it, against `original`, {' and '.join(fewer)}.",
    ]


def _points(difference: Mapping[str, float]) -> str:
    """A difference of shares in points, with its interval."""
    mean, low, high = (f"{100 * difference[name]:+.1f}" for name in ("mean", "low", "high"))
    return f"{mean} points ({low} to {high})"


def _longer(ratio: float) -> str:
    return f"{ratio:.2f} times as long" + (f", {ratio - SLOWER:.2f} too much," if ratio > SLOWER else "")


def _won(lost: Mapping[str, float], won: Mapping[str, float]) -> str:
    if lost["high"] >= 0:
        return "`assembled` lost nothing that could be told, so there was nothing to win back"
    return f"{-100 * won['mean'] / lost['mean']:.0f} % of what that lost"


def _decibels(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    nearer = one["likeness"]["psnr"] - other["likeness"]["psnr"]
    return f"{abs(nearer):.1f} dB {'nearer to' if nearer >= 0 else 'farther from'}"


_PAGE = """# The embedded model's UNets

{table}
MACs are of one row of the batch at 128 px. Times are the UNet's, one picture with guidance, relative to `original`: medians of
{rounds} interleaved rounds on ONNX Runtime's CPU provider, lowest and highest in brackets. Concept and style: shares of {count}
pictures in which the reader finds them first, half of pairs that training saw and half of pairs that it did not, with intervals
of 95 %, {steps} steps of DPM++, guidance {guidance:g}; [what the reader finds in real pictures](embedded-model.md) is the most
that can be reached. PSNR: to the pictures that `original` makes from the same noise, mean. Differences below are of the same
prompts and noise, with the interval of 95 % of their mean; every variant was trained once.
Before distillation `condconv` has no row: it is `assembled` before distillation, exactly, whatever its experts hold.

{goals}

![A row for each UNet, a column for each prompt](variants.png)

Made by `make table` (`python -m benchmarks.quality.variants`; with `--page`, from the figures of
[variants.json](../benchmarks/results/variants.json) alone).
"""
