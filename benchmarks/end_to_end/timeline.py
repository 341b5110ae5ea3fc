"""The timeline of one picture: a line for each plan, a bar for each segment, in the colour of its block.

Every segment is waited for and timed by itself, so the pictures of the table are made without it. On CUDA whole steps are graphs:
there is no timeline there.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.support.extras import need
from engines.support.files import atomic_file

__all__ = ["Span", "plot_timeline"]

Span = tuple[str, float, float]
"""A segment, and the seconds since the call at which it started and ended."""
_REST = "#d9dde0"


def plot_timeline(lines: Mapping[str, Sequence[Span]], path: Path, title: str) -> None:
    """Writes a PNG: time to the right, a line for each name; what no segment takes is grey.

    Raises:
        UserError: matplotlib is not installed.
    """
    need("matplotlib", "the timeline")
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    segments = list(dict.fromkeys(_block(name) for spans in lines.values() for name, _, _ in spans))
    shades = colormaps["turbo"]
    colours = {name: shades((number + 0.5) / len(segments)) for number, name in enumerate(segments)}
    figure = Figure(figsize=(12, 1.9 + 0.55 * len(lines)), layout="constrained")
    axis: Any = figure.subplots()
    for row, spans in enumerate(lines.values()):
        axis.barh(row, spans[-1][2], height=0.7, color=_REST)
        for name in segments:
            own = [(start, end - start) for each, start, end in spans if _block(each) == name]
            axis.broken_barh(own, (row - 0.35, 0.7), facecolors=[colours[name]])
    axis.set_yticks(range(len(lines)), lines)
    axis.invert_yaxis()
    axis.set_xlabel("seconds since the call")
    axis.margins(x=0.01)
    handles = [*(Patch(color=colours[name], label=name) for name in segments), Patch(color=_REST, label="between segments")]
    figure.legend(handles=handles, loc="outside lower left", ncols=9, fontsize=7)
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _block(segment: str) -> str:
    """down.0.layer.1.attention is part of down.0."""
    first, *rest = segment.split(".")
    return ".".join([first, *rest[:1]]) if first in {"down", "up"} else first
