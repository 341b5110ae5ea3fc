"""The strip of a plan as SVG: steps across, the UNet's units down, filled as far as the call has come.

Steps that look alike share one drawing, so that a strip of a large UNet is some kilobytes, and can be sent at every step.
"""

from collections.abc import Sequence
from html import escape
from itertools import groupby

from engines.bundle.names import BRANCH
from runtime.execution.executor import StepRecord
from runtime.plans.schedule import Schedule
from runtime.report.explain import COLOURS, unit_states

__all__ = ["Strip"]

_NAMES = list(COLOURS)
_CELL, _GAP = 10, 1.2
"""Side of a cell, and what is left free of it, in units of the drawing."""
_LEAST_LABELLED = 3
"""Units of a block whose name there is room for."""


class Strip:
    """The units that a schedule computes and inherits at every step; steps decided while running are filled in later."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self.units, rows = unit_states(schedule)
        self.columns = [list(column) for column in zip(*rows, strict=True)]

    def note(self, record: StepRecord) -> None:
        """Put what a step really did where the plan leaves it open."""
        manifest = self._schedule.unets[record.unet]
        ran = {unit for segment in manifest.segments if segment.name in record.ran for unit in segment.units}
        column = self.columns[record.index]
        for row, (unit, state) in enumerate(zip(self.units, column, strict=True)):
            if _NAMES[state] == "as decided":
                inherited = {unit, f"{unit}{BRANCH}"} & {*record.inherited}
                column[row] = _NAMES.index("inherited" if inherited else "computed" if unit in ran else "not needed")

    def svg(self, done: int = 0, *, running: bool = False) -> str:
        """The strip with its labels and legend, as HTML.

        Args:
            done: how many steps are filled.
            running: whether the next one is under way.
        """
        kinds = list(dict.fromkeys(map(tuple, self.columns)))
        drawn = "".join(f'<g id="kind-{number}">{_column(kind)}</g>' for number, kind in enumerate(kinds))
        steps = "".join(
            f'<use href="#kind-{kinds.index(tuple(column))}" x="{_CELL * index}" class="{_progress(index, done, running)}"/>'
            for index, column in enumerate(self.columns)
        )
        box = f"0 0 {_CELL * len(self.columns)} {_CELL * len(self.units)}"
        title = escape(f"plan {self._schedule.plan.name}: {done} of {len(self.columns)} steps")
        return (
            f'<div class="strip"><div class="blocks">{_labels(self.units)}</div>'
            f'<svg viewBox="{box}" preserveAspectRatio="none" role="img" aria-label="{title}"><defs>{drawn}</defs>{steps}</svg>'
            f'<div></div><div class="axis"><span>step 1</span><span>{len(self.columns)}</span></div></div>{self._legend()}'
        )

    def _legend(self) -> str:
        shown = sorted({state for column in self.columns for state in column})
        chips = "".join(f'<span><i style="background:{_paint(state)}"></i>{_NAMES[state]}</span>' for state in shown)
        return f'<div class="legend">{chips}</div>'


def _progress(index: int, done: int, running: bool) -> str:
    return "done" if index < done else "now" if running and index == done else "later"


def _column(states: Sequence[int]) -> str:
    """One step: a path for each state, with a cell for each unit."""
    side = f"{_CELL - _GAP:g}"
    return "".join(
        f'<path style="fill:{_paint(number)}" d="'
        + "".join(f"M0 {_CELL * row}h{side}v{side}h-{side}z" for row, state in enumerate(states) if state == number)
        + '"/>'
        for number in sorted(set(states))
    )


def _paint(state: int) -> str:
    """The colour of a state, which the page's CSS may change by its name."""
    name = _NAMES[state]
    return f"var(--{name.replace(' ', '-')}, {COLOURS[name]})"


def _labels(units: Sequence[str]) -> str:
    """The blocks beside their units, each as high as these."""
    blocks = groupby(units, key=lambda unit: ".".join(unit.split(".")[: 2 if unit.startswith(("down", "up")) else 1]))
    sized = [(name, len(list(members))) for name, members in blocks]
    return "".join(
        f'<span style="flex:{count}">{escape(name) if count >= _LEAST_LABELLED else ""}</span>' for name, count in sized
    )
