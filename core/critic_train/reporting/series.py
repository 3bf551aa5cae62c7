"""What the charts and tables of several critics have in common."""

from collections.abc import Callable, Sequence
from typing import Any

from critic_train.reporting.drawing import Key
from critic_train.reporting.records import Record
from critic_train.reporting.subjects import Subject


def with_rows(subjects: Sequence[Subject], table: str, *keys: str) -> list[tuple[Subject, list[Record]]]:
    """The critics that have such a table, with the rows of it in which every key has a figure."""
    found = []
    for subject in subjects:
        rows = [row for row in subject.metrics.rows(table) if all(row.get(key) is not None for key in keys)]
        if rows:
            found.append((subject, rows))
    return found


def keys_of(found: Sequence[tuple[Subject, Any]], alone: str = "") -> list[Key]:
    """A legend entry for each critic; none for one that is alone, unless it has a name for that."""
    if len(found) == 1:
        return [Key(text=alone, ink=found[0][0].ink)] if alone else []
    return [Key(text=subject.name, ink=subject.ink) for subject, _ in found]


def heading(subject: Subject, among: Sequence[Any], columns: int) -> list[list[str]]:
    """The row that begins a critic's part of a table, where there are several."""
    return [[subject.name] + [""] * (columns - 1)] if len(among) > 1 else []


def table_of(
    found: Sequence[tuple[Subject, list[Record]]], titles: Sequence[str], cells: Callable[[Record], list[Any]]
) -> list[list[Any]]:
    """A table below its titles: the cells of every critic's rows, below its name where there are several."""
    table: list[list[Any]] = [list(titles)]
    for subject, rows in found:
        table += heading(subject, found, len(titles)) + [cells(row) for row in rows]
    return table


def per_cent(row: Record) -> str:
    """The part of the response that a row speaks of."""
    return f"{100 * row.get('from'):.0f} to {100 * row.get('to'):.0f} %"


def middles(rows: Sequence[Record]) -> list[float]:
    """Of parts of the response, in per cent."""
    return [50 * (row.get("from") + row.get("to")) for row in rows]
