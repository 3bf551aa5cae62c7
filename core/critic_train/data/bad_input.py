"""Rows and files that cannot be used: marked in a batch, counted over a data set, listed in errors and results."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from critic_train.errors import DataError


class RowErrors:
    """The bad rows of a batch, each with the first error that was marked in it.

    Args:
        rows: rows in the batch.

    Attributes:
        bad: bool [rows].
        by_row: row -> (reason, column, actual, expected).
    """

    def __init__(self, rows: int) -> None:
        self.bad: NDArray[np.bool_] = np.zeros(rows, dtype=np.bool_)
        self.by_row: dict[int, tuple[str, str, str, str]] = {}
        self._ignored: NDArray[np.bool_] = np.zeros(rows, dtype=np.bool_)

    def ignore(self, rows: NDArray[np.bool_]) -> None:
        """Mark nothing more in these rows: bool [rows in the batch]. They will not be used."""
        self._ignored = self._ignored | rows

    def mark(
        self, rows: NDArray[np.bool_], column: str, reason: str, actual: Callable[[int], str], expected: str
    ) -> None:
        """Mark those of the rows that are not marked yet.

        Args:
            rows: bool [rows in the batch].
            column: the shard's name of the bad column.
            reason: the kind of error, under which it is counted.
            actual: what stands in a row.
            expected: what should stand there.
        """
        fresh = rows & ~self.bad & ~self._ignored
        if fresh.any():
            for row in np.flatnonzero(fresh).tolist():
                self.by_row[row] = (reason, column, actual(row), expected)
            self.bad |= fresh

    def take(self, others: "RowErrors") -> None:
        """Mark the rows that are marked in `others`, of the same batch, for the same reasons."""
        fresh = others.bad & ~self.bad & ~self._ignored
        self.by_row.update({row: others.by_row[row] for row in np.flatnonzero(fresh).tolist()})
        self.bad |= fresh


ROWS_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """Where a bad row is, its content and what was expected.

    `row` counts from 0 within the row group, or within a file that has no row groups; `unit` says what it counts there.
    """

    file: str
    row_group: int | None = None
    unit: str = "row"
    row: int
    column: str
    actual: str
    expected: str

    def __str__(self) -> str:
        within = "" if self.row_group is None else f", row group {self.row_group}"
        column = f", column {self.column}" if self.column else ""
        return f"{self.file}{within}, {self.unit} {self.row}{column}: found {self.actual}, expected {self.expected}"


@dataclass(slots=True)
class BadRows:
    """A running count of bad rows.

    Attributes:
        most_listed: the number of rows that are listed one by one.
        count: how many there are.
        reasons: how many there are of each kind.
        first: the first `most_listed` of them.
    """

    most_listed: int = ROWS_SHOWN
    count: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[BadRow] = field(default_factory=list)

    def add(self, reason: str, row: BadRow) -> None:
        """Count one."""
        self.count += 1
        self.reasons[reason] += 1
        if len(self.first) < self.most_listed:
            self.first.append(row)

    def error(self, *, all_of_them: bool = False) -> DataError:
        """The error that lists them.

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
            hint="check which column is read as what; --column maps names"
            if all_of_them
            else "--on-bad-rows skip leaves them out and counts them",
        )

    def summary(self) -> dict[str, Any]:
        """For records and reports; JSON-able."""
        return {"count": self.count, "reasons": dict(self.reasons), "first": [str(row) for row in self.first]}


FILES_SHOWN = 20
NAMES_A_LINE = 3
LEAVES_OUT = "--on-bad-file skip leaves it out and counts it; copying it again may mend it"
LEAVES_THEM_OUT = "--on-bad-file skip leaves them out and counts them; copying them again may mend them"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadFile:
    """A file that cannot be used.

    Attributes:
        file: its name as the user gave it.
        fault: why, to be read after the name; one line or several.
        message: the same as a sentence of its own, with the name in it.
        hint: what to do about it, where that is more than to mend or replace the file.
        rows: how many rows its footer claims; None where the footer cannot be read.
    """

    file: str
    fault: str
    message: str = ""
    hint: str = ""
    rows: int | None = None

    @classmethod
    def of(cls, name: str, error: DataError, rows: int | None) -> "BadFile":
        """A file from the error it raised, whose message may begin with the name."""
        fault = error.message.removeprefix(name).lstrip(" ,:")
        return cls(file=name, fault=fault, message=error.message, hint=error.hint, rows=rows)


@dataclass(slots=True)
class BadFiles:
    """The bad files of a data set, each once, in the order added.

    Attributes:
        by_name: name -> the file.
    """

    by_name: dict[str, BadFile] = field(default_factory=dict)

    def add(self, file: BadFile) -> None:
        """Add a file; of one that was added before, the first error stays."""
        self.by_name.setdefault(file.file, file)

    def __len__(self) -> int:
        return len(self.by_name)

    def __contains__(self, name: str) -> bool:
        return name in self.by_name

    @property
    def rows(self) -> int:
        """Rows that the footers of the bad files claim."""
        return sum(file.rows or 0 for file in self.by_name.values())

    def lines(self) -> list[str]:
        """A line for each file; files with the same fault share one. Long lists are cut and counted."""
        by_fault: dict[str, list[str]] = {}
        for file in self.by_name.values():
            by_fault.setdefault(_in_a_line(file.fault), []).append(file.file)
        lines = [
            f"{', '.join(names[start : start + NAMES_A_LINE])}: {fault}"
            for fault, names in by_fault.items()
            for start in range(0, len(names), NAMES_A_LINE)
        ]
        return lines[:FILES_SHOWN] + ([f"and {len(lines) - FILES_SHOWN:,} more"] if len(lines) > FILES_SHOWN else [])

    def error(self, *, all_of_them: bool = False) -> DataError:
        """The error that lists them.

        Args:
            all_of_them: whether there is no good file.
        """
        if len(self.by_name) == 1:
            (file,) = self.by_name.values()
            hints = [hint for hint in (file.hint, "" if all_of_them else LEAVES_OUT) if hint]
            return DataError(file.message or f"{file.file}: {file.fault}", hint="\n".join(hints))
        left = ", and there are no others" if all_of_them else ""
        shown = "\n".join(f"  {line}" for line in self.lines())
        hints = list(dict.fromkeys(file.hint for file in self.by_name.values() if file.hint))[:1]
        hints += [] if all_of_them else [LEAVES_THEM_OUT]
        return DataError(f"{len(self.by_name)} files cannot be used{left}\n{shown}", hint="\n".join(hints))

    def sentence(self) -> str:
        """What was left out, for a notice."""
        count = len(self.by_name)
        lines = "\n".join(f"  {line}" for line in self.lines())
        what = "1 file is left out" if count == 1 else f"{count} files are left out"
        return f"{what}, with the {self.rows:,} rows their footers tell of:\n{lines}"

    def summary(self) -> dict[str, Any]:
        """For records and reports; JSON-able. Every file is in it."""
        files = [
            {"file": file.file, "rows": file.rows, "fault": _in_a_line(file.fault)} for file in self.by_name.values()
        ]
        return {"count": len(files), "rows": self.rows, "files": files}


def _in_a_line(fault: str) -> str:
    """A fault of several lines in one: those that are indented are a list of what the line before them says."""
    text, was_listed = "", False
    for line in fault.splitlines():
        sentence, is_listed = " ".join(line.split()), line.startswith(" ")
        if sentence:
            text += (", " if is_listed and was_listed else ". " if was_listed else " ") + sentence
            was_listed = is_listed
    return text.strip()
