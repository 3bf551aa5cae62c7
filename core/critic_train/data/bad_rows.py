"""Rows that cannot be used: all are counted, the first ten are kept to be shown."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from critic_train.errors import DataError

SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """Where a row is, what was found there and what was expected.

    `row` counts from 0 within the row group; where a file has none of those, in the file, and `unit` says what it
    counts.
    """

    file: str
    row_group: int | None = None
    unit: str = "row"
    row: int
    column: str
    found: str
    expected: str

    def __str__(self) -> str:
        within = "" if self.row_group is None else f", row group {self.row_group}"
        column = f", column {self.column}" if self.column else ""
        return f"{self.file}{within}, {self.unit} {self.row}{column}: found {self.found}, expected {self.expected}"


@dataclass(slots=True)
class BadRows:
    """A running count of bad rows.

    Attributes:
        kept: how many are kept to be named.
        count: how many there are.
        reasons: how many there are of each kind.
        first: the first `kept` of them.
    """

    kept: int = SHOWN
    count: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[BadRow] = field(default_factory=list)

    def add(self, reason: str, row: BadRow) -> None:
        """Count one."""
        self.count += 1
        self.reasons[reason] += 1
        if len(self.first) < self.kept:
            self.first.append(row)

    def error(self, *, all_of_them: bool = False) -> DataError:
        """The fault that tells of them.

        Args:
            all_of_them: whether there was no good row.
        """
        kinds = "; ".join(f"{count} with {reason}" for reason, count in self.reasons.most_common())
        shown = "\n".join(f"  {row}" for row in self.first)
        more = f"\n  ... and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        rows = "1 row" if self.count == 1 else f"{self.count} rows"
        left = ", and there are no others" if all_of_them else ""
        return DataError(
            f"{rows} cannot be used ({kinds}){left}\n{shown}{more}",
            hint="are the columns what they seem? --column says which is which"
            if all_of_them
            else "--on-bad-rows skip leaves them out and counts them",
        )

    def summary(self) -> dict[str, Any]:
        """For records and reports; JSON-able."""
        return {"count": self.count, "reasons": dict(self.reasons), "first": [str(row) for row in self.first]}
