"""The GPU check's parts in their order and with about their times, said without a GPU and without doing any of it."""

from argparse import Namespace
from collections.abc import Iterable, Sequence
from importlib.util import find_spec

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

__all__ = ["minutes_of", "show_plan"]

_PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx", "onnxruntime": "onnxruntime"}
_BUILD = {"torch": (0.4, 1.5), "onnxruntime": (0.2, 0.5), "tensorrt-rtx": (0.5, 1.5), "tensorrt": (1.0, 5.0)}
_PLAN = (0.1, 0.3)
_SEGMENTS = (0.2, 1.0)
_START = (0.2, 0.5)
_BASELINES = {"baselines": (0.5, 1.5), "baselines, compiled": (1.0, 2.5)}
"""Minutes for the embedded model and for Stable Diffusion's full size: guesses, for a recent card and 16 cores. What parts really
take is written with what the check finds (``seconds``)."""
_SMALL = frozenset({"mini", "emoji"})


def minutes_of(part: str, options: Namespace, engines: Sequence[str]) -> float:
    """About how long a part takes, in minutes."""
    full = options.source not in _SMALL
    kind, _, _rest = part.partition(" ")
    if part in _BASELINES:
        return _BASELINES[part][full]
    if kind == "build":
        return sum(_BUILD.get(name, (0.5, 1.0))[full] for name in engines)
    if kind == "start":
        return _START[full]
    plans = len(options.plans) * _PLAN[full] if "plans" in options.only else 0.0
    return plans + (_SEGMENTS[full] if "segments" in options.only else 0.0)


def show_plan(console: Console, options: Namespace, parts: Iterable[str]) -> None:
    """Print the parts in their order, each with about when it begins and how long it takes, and what is missing here."""
    table = Table(
        box=SIMPLE, title=f"{options.source}, {options.variant}, {options.steps} steps, plans {', '.join(options.plans)}"
    )
    for name in ("", "part", "begins at, min", "takes about, min"):
        table.add_column(name, justify="left" if name == "part" else "right")
    began, left_out = 0.0, []
    for number, part in enumerate(parts, start=1):
        if options.budget is not None and began >= options.budget:
            left_out.append(part)
            continue
        takes = minutes_of(part, options, options.engines)
        table.add_row(str(number), part, f"{began:.1f}", f"{takes:.1f}")
        began += takes
    console.print(table)
    console.print(f"about {began:.0f} minutes; nothing was built or run", highlight=False)
    if left_out:
        console.print(f"not begun, for the budget of {options.budget:g} minutes: {', '.join(left_out)}", highlight=False)
    missing = [name for name in options.engines if name in _PACKAGES and find_spec(_PACKAGES[name]) is None]
    for name in missing:
        console.print(f"engine {name} is not installed here and would be left out", highlight=False)
