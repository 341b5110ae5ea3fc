"""Tables for terminals of any width: what does not fit is left out by columns, for a number that is cut is another number."""

from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

__all__ = ["fit"]


def fit(table: Table, console: Console, optional: Sequence[str]) -> Table:
    """The table without as many of its ``optional`` columns, the first ones first, as a console's width takes.

    Columns are named by their heads; numbers are kept on one line, and texts wrap between words.
    """
    for column in table.columns:
        column.no_wrap = column.no_wrap or column.justify == "right"
        column.overflow = "fold"
    for name in optional:
        if _measured(table, console).minimum <= console.width:
            break
        table.columns[:] = [column for column in table.columns if column.header != name]
    _share(table, console)
    return table


def _measured(table: Table, console: Console) -> Measurement:
    return Measurement.get(console, console.options.update(max_width=10_000), table)


def _share(table: Table, console: Console) -> None:
    """Give columns of text a width in which their words stay whole, and what is left to those that have more of it."""
    texts = {number: column for number, column in enumerate(table.columns) if not column.no_wrap}
    lines = {number: max(map(len, _lines(column))) for number, column in texts.items()}
    words = {
        number: max(len(word) for line in _lines(column) for word in line.split() or [""]) for number, column in texts.items()
    }
    left = console.width - (_measured(table, console).maximum - sum(lines.values())) - sum(words.values())
    wanted = sum(lines.values()) - sum(words.values())
    if not 0 <= left < wanted:  # all of it fits, or not even the words do
        return
    for number, column in texts.items():
        column.width = words[number] + left * (lines[number] - words[number]) // wanted


def _lines(column: Column) -> list[str]:
    """The lines of a column's cells, its header first."""
    return [line for cell in (column.header, *column.cells) for line in str(cell).splitlines() or [""]]
