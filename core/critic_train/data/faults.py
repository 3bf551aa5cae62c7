"""Which rows of a batch are bad, and why: one fault a row, the first that is found."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


class Faults:
    """The bad rows of a batch.

    Args:
        rows: rows in the batch.

    Attributes:
        bad: bool [rows].
        found: row -> (reason, column, found, expected).
    """

    def __init__(self, rows: int) -> None:
        self.bad: NDArray[np.bool_] = np.zeros(rows, dtype=np.bool_)
        self.found: dict[int, tuple[str, str, str, str]] = {}
        self._ignored: NDArray[np.bool_] = np.zeros(rows, dtype=np.bool_)

    def ignore(self, rows: NDArray[np.bool_]) -> None:
        """Mark nothing more in these rows: bool [rows in the batch]. They will not be used."""
        self._ignored = self._ignored | rows

    def mark(
        self, rows: NDArray[np.bool_], column: str, reason: str, found: Callable[[int], str], expected: str
    ) -> None:
        """Mark those of the rows that are not marked yet.

        Args:
            rows: bool [rows in the batch].
            column: the shard's name of the column at fault.
            reason: the kind of fault, under which it is counted.
            found: what stands in a row.
            expected: what should stand there.
        """
        fresh = rows & ~self.bad & ~self._ignored
        if fresh.any():
            for row in np.flatnonzero(fresh).tolist():
                self.found[row] = (reason, column, found(row), expected)
            self.bad |= fresh
