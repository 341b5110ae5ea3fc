"""Names beside the points of a plot, where they cover neither each other nor a point."""

from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["box_of", "place_label"]

_GREY = "#9aa5ad"


def place_label(
    axis: Any, text: str, point: tuple[float, float], points: Sequence[tuple[float, float]], colour: str, **style: Any
) -> None:
    """Write a text near a point where it covers neither another text nor a point; a line leads from far ones to their point.

    Texts choose their places in the order in which they are written, so the longest come first. The figure has been laid out.

    Args:
        axis: whose texts are all such labels.
        text: the label.
        point: in the axis' data.
        points: all that are drawn.
        colour: of the text.
        style: what else matplotlib's texts take.
    """
    from matplotlib.patheffects import withStroke

    taken = [box_of(note).padded(3) for note in axis.texts]
    marks = axis.transData.transform(points)
    arrow = {"arrowstyle": "-", "color": _GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
    note = axis.annotate(
        text, point, color=colour, textcoords="offset points", xytext=(0, 0), ha="center", va="center", arrowprops=arrow,
        **{"fontsize": 7.5, **style},
    )  # fmt: skip
    note.set_path_effects([withStroke(linewidth=2, foreground="white")])
    half = box_of(note).width / 2 * 72 / axis.figure.dpi
    for offset in _offsets(half):
        note.xyann = offset
        box = box_of(note)
        inside = axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1 and axis.bbox.y0 <= box.y0 and box.y1 <= axis.bbox.y1
        covers = any(box.overlaps(other) for other in taken) or any(box.padded(4).contains(*mark) for mark in marks)
        if inside and not covers:
            return


def box_of(note: Any) -> Any:
    """Where a note's text is, in pixels, without its line."""
    from matplotlib.text import Text

    note.update_positions(note.figure.canvas.get_renderer())
    return Text.get_window_extent(note)


def _offsets(half: float) -> Iterator[tuple[float, float]]:
    """Places for the middle of a text that is twice ``half`` points wide: beside its point, above, below, then further away."""
    for far in (0, 8, 16, 26, 38, 52, 68, 86, 106, 128):
        wide, high = half + 5 + far, 8 + far
        yield from ((wide, 0), (0, high), (0, -high), (-wide, 0), (wide, high), (wide, -high), (-wide, high), (-wide, -high))
