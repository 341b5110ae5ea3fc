"""Tables for terminals of any width: what does not fit is left out by columns, for a number that is cut is another number."""

from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

__all__ = ["fit"]


def fit(table: Table, console: Console, optional: Sequence[str]) -> Table:
    """The table without as many of its ``optional`` columns, the first ones first, as a console's width takes.

    Columns are named by their heads; numbers are kept on one line, and texts wrap between words.
    """
    for column in table.columns:
        column.no_wrap = column.no_wrap or column.justify == "right"
        column.overflow = "fold"
    for name in optional:
        if Measurement.get(console, console.options.update(max_width=10_000), table).minimum <= console.width:
            break
        table.columns[:] = [column for column in table.columns if column.header != name]
    return table
