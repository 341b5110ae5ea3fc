"""Tables of shares for the console."""

from rich.console import Console
from rich.table import Table

__all__ = ["show"]


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Prints shares as percentages, one row per key."""
    columns = list(next(iter(rows.values())))
    table = Table("", *columns, title=title)
    for name, values in rows.items():
        table.add_row(name, *(f"{100 * values[column]:.1f} %" for column in columns))
    Console(width=130).print(table)
