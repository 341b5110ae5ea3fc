"""The plot of `benchmarks.quality.plans`: speed against what a reader finds as in `full`, and against likeness to `full`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.support.files import atomic_file
from tuning.ranking.labels import place_label

__all__ = ["front", "plot"]

_FRONT, _REST, _CONTROL = "#c8553d", "#2f6690", "#7d8790"
_LINE = 0.175
"""Inches of a line in the list of plans."""
_MEASURES = {"same": "pictures in which a reader finds what it finds in that of full, %", "psnr": "PSNR to those of full, dB"}


def front(rows: Sequence[dict[str, Any]], measure: str, cost: str = "time") -> list[str]:
    """Names of the plans that no cheaper plan matches in ``measure``, the cheapest first; ``cost`` is ``time`` or ``macs``.

    What lies inside the intervals of a cheaper plan does not count as better. A measure of None is better than any number: it is
    the PSNR of `full` to itself.
    """
    names, best = [], float("-inf")
    for row in sorted(rows, key=lambda row: (float(row[cost]), -_value(row, measure))):
        if _value(row, f"{measure}_low", measure) > best:
            names.append(str(row["plan"]))
        best = max(best, _value(row, f"{measure}_high", measure))
    return names


def _value(row: dict[str, Any], *measures: str) -> float:
    """The first of the measures that the row has."""
    value = next(row[measure] for measure in measures if measure in row)
    return float("inf") if value is None else float(value)


def plot(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Write a PNG of two panels and a list of all plans; points of a front bear its name, others their number in the list.

    Args:
        rows: of each plan ``plan``, ``time`` (relative to `full`), ``same`` (a share) and ``psnr`` (in dB, or None).
        title: of the whole.
        path: the file.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    size = 15, max(6.2, _LINE * (len(rows) + 4))
    figure, (left, right, beside) = pyplot.subplots(1, 3, figsize=size, width_ratios=(1, 1, 0.52), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axis, measure in zip((left, right), _MEASURES, strict=True):
        _panel(axis, rows, measure)
    _list(beside, rows)
    figure.canvas.draw()  # where things are is known once they are laid out
    figure.set_layout_engine("none")
    for axis, measure in zip((left, right), _MEASURES, strict=True):
        _name_points(axis, rows, measure)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)


def _points(rows: Sequence[dict[str, Any]], measure: str) -> dict[int, tuple[float, float]]:
    """Where in a panel the plan of a row is; without those that no number says."""
    scale = 100 if measure == "same" else 1
    shown = [number for number, row in enumerate(rows) if row[measure] is not None]
    return {number: (1 / float(rows[number]["time"]), scale * float(rows[number][measure])) for number in shown}


def _panel(axis: Any, rows: Sequence[dict[str, Any]], measure: str) -> None:
    best, points = front(rows, measure), _points(rows, measure)
    on_front = [point for number, point in points.items() if rows[number]["plan"] in best]
    colours = [_colour(rows[number], best) for number in points]
    axis.scatter(*zip(*points.values(), strict=True), s=22, c=colours, zorder=3)
    axis.plot(*zip(*sorted(on_front), strict=True), color=_FRONT, linewidth=1, zorder=1)
    axis.set_xlabel("UNet speed, times that of full")
    axis.set_ylabel(_MEASURES[measure])
    axis.grid(alpha=0.3)
    axis.margins(x=0.16, y=0.12)
    axis.set_title(
        "Pareto front in red, fewer steps of full in grey"
        + ("" if measure == "same" else "; full itself would be at speed 1, infinitely high"),
        fontsize=9,
    )


def _colour(row: dict[str, Any], best: Sequence[str]) -> str:
    if row["plan"] in best:
        return _FRONT
    return _CONTROL if _is_control(row) else _REST


def _is_control(row: dict[str, Any]) -> bool:
    """Whether it is no plan, but `full` with fewer steps."""
    return str(row["plan"]).endswith(" steps")


def _name_points(axis: Any, rows: Sequence[dict[str, Any]], measure: str) -> None:
    best, points = front(rows, measure), _points(rows, measure)
    # Names are longer than numbers, so they choose their places first.
    for number in sorted(points, key=lambda number: rows[number]["plan"] not in best):
        on_front = rows[number]["plan"] in best
        text = rows[number]["plan"] if on_front else str(number + 1)
        place_label(axis, text, points[number], list(points.values()), _colour(rows[number], best))


def _list(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    fronts = {measure: front(rows, measure) for measure in _MEASURES}
    axis.axis("off")
    cells = []
    for number, row in enumerate(rows, start=1):
        psnr = "-" if row["psnr"] is None else f"{row['psnr']:.1f}"
        cells.append([str(number), row["plan"], f"{1 / row['time']:.2f}", f"{100 * row['same']:.1f}", psnr])
    table = axis.table(
        cells, colLabels=["no.", "plan", "speed", "%", "dB"], colWidths=[0.08, 0.5, 0.14, 0.14, 0.14], loc="center", edges="open"
    )
    table.auto_set_font_size(False)
    table.set_fontsize(7.5)
    for cell in table.get_celld().values():
        cell.set_height(1 / (len(rows) + 2))
    for (line, column), cell in table.get_celld().items():
        cell.set_text_props(ha="left" if column == 1 else "right")
        if line and rows[line - 1]["plan"] in fronts.get({3: "same", 4: "psnr"}.get(column, ""), ()):
            cell.set_text_props(color=_FRONT, weight="bold")
