"""Tables of rich: their headings, how they look, and whether they fit."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def new_table(first: str, headings: Sequence[str], *, bare: bool = False) -> "Table":
    """A table whose first column names the row and whose others are figures."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=None if bare else SIMPLE_HEAD, show_header=not bare, show_edge=False, pad_edge=False)
    table.add_column(first, overflow="fold", vertical="top")
    for heading in headings:
        table.add_column(heading, justify="left" if bare else "right", overflow="fold", vertical="bottom")
    return table


def fits(console: "Console", table: "Table") -> bool:
    """Whether the table has room without folding a cell."""
    from rich.measure import Measurement

    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width


def first_that_fits(console: "Console", tables: Sequence["Table"]) -> "Table":
    """The first table that has room; where none has, the last, its cells folded."""
    return next((table for table in tables if fits(console, table)), tables[-1])


def in_short(name: str) -> str:
    """A critic's path as a heading: its last two parts, one below the other."""
    parts = [part for part in name.split("/") if part]
    return "/\n".join(parts[-2:]) if "/" in name else name.replace(" ", "\n", 1)
