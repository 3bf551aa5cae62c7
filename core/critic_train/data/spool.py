"""A private on-disk copy of checked rollouts, from which any rollout is read in one seek.

Training takes rollouts in shuffled order, over and over; Parquet is made for reading from front to back. So the
rollouts are read once and kept as flat columns, one file each. Reads are positioned reads into fresh arrays, not
memory maps, so resident memory stays flat however large the data is.
"""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from critic_train.rollouts import Rollouts, offsets_of
from critic_train.run.storage import File, remove, rename, sync_directory

FORMAT_VERSION = 3
COLUMNS: dict[str, type[np.generic]] = {
    "input_ids": np.int32,
    "response_mask": np.bool_,
    "returns": np.float32,
    "values": np.float32,
    "rewards": np.float32,
}
OPTIONAL = frozenset({"values", "rewards"})
"""Kept only where every rollout has them."""
INDEX = {
    "offsets": np.int64,
    "groups": np.int64,
    "prompts": np.int64,
    "rows": np.int64,
    "response_counts": np.int64,
    "return_sums": np.float64,
    "truncated": np.bool_,
}


class SpoolDamaged(ValueError):  # noqa: N818 - it names a state, not a programming error
    """The spool is absent, incomplete or of another version."""


class Spool:
    """Rollouts kept on disk. Open one with `Spool.open`, make one with `write_spool` or `SpoolWriter`.

    Attributes:
        offsets: int64 [n+1], first token of every rollout in the column files.
        groups: int64 [n], prompt group keys.
        prompts: int64 [n], keys of the tokens before the response.
        rows: int64 [n], rows in the data set as read.
        response_counts: int64 [n], masked tokens.
        return_sums: float64 [n], sum of the returns over masked tokens.
        max_token_id: the largest id.
        truncated: bool [n], rollouts known to have been cut.
        columns: the token columns that are kept.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
            if meta["format_version"] != FORMAT_VERSION:
                raise SpoolDamaged(f"{directory} has format version {meta['format_version']}")
            index = {name: np.load(directory / f"{name}.npy", allow_pickle=False) for name in INDEX}
            self.max_token_id = int(meta["max_token_id"])
            self.columns = [str(name) for name in meta["columns"]]
        except SpoolDamaged:
            raise
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise SpoolDamaged(f"{directory}: {error}") from error
        self.offsets: NDArray[np.int64] = index["offsets"]
        self.groups: NDArray[np.int64] = index["groups"]
        self.prompts: NDArray[np.int64] = index["prompts"]
        self.rows: NDArray[np.int64] = index["rows"]
        self.response_counts: NDArray[np.int64] = index["response_counts"]
        self.return_sums: NDArray[np.float64] = index["return_sums"]
        self.truncated: NDArray[np.bool_] = index["truncated"]
        sizes = {name: column.shape for name, column in index.items()}
        if any(shape != (len(self.offsets) - (name != "offsets"),) for name, shape in sizes.items()):
            raise SpoolDamaged(f"{directory}: its index disagrees on the number of rollouts")
        for name in self.columns:
            expected = self.num_tokens * np.dtype(COLUMNS[name]).itemsize
            file = directory / name
            if not file.is_file() or file.stat().st_size != expected:
                raise SpoolDamaged(f"{file} is missing or has the wrong size")

    @classmethod
    def open(cls, directory: Path) -> "Spool":
        """Open a spool that stands complete.

        Raises:
            SpoolDamaged: there is none, or not a whole one.
        """
        return cls(directory)

    @property
    def has_values(self) -> bool:
        """Whether values are kept."""
        return "values" in self.columns

    @property
    def num_rollouts(self) -> int:
        """Rollouts kept."""
        return len(self.groups)

    @property
    def num_tokens(self) -> int:
        """Tokens kept."""
        return int(self.offsets[-1])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 [n], tokens of each rollout."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def max_length(self) -> int:
        """Tokens of the longest rollout."""
        return int(self.lengths.max(initial=0))

    def read(self, index: NDArray[np.int64], values_from: str | None = None) -> Rollouts:
        """Read rollouts in the order given.

        Args:
            index: int64 [m], places in the spool.
            values_from: an extra column to take as `values` in place of the stored ones.
        """
        offsets = offsets_of(self.lengths[index])
        names = [name for name in self.columns if name != "values"]
        columns = {name: self._read_column(name, COLUMNS[name], index, offsets) for name in names}
        values_from = values_from or ("values" if self.has_values else None)
        values = None if values_from is None else self._read_column(values_from, np.float32, index, offsets)
        return Rollouts(
            input_ids=columns["input_ids"],
            offsets=offsets,
            response_mask=columns["response_mask"],
            returns=columns["returns"],
            values=values,
            group=self.groups[index],
            row=self.rows[index],
            rewards=columns.get("rewards"),
            truncated=self.truncated[index] if "rewards" in columns else None,
        )

    def read_column(self, name: str, kind: type[np.generic], index: NDArray[np.int64]) -> NDArray[Any]:
        """An extra column of some rollouts, end to end in the order given.

        Args:
            name: the column.
            kind: its dtype, as it was written.
            index: int64 [m], places in the spool.
        """
        return self._read_column(name, kind, index, offsets_of(self.lengths[index]))

    def places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [m], where the rollouts with these rows in the data set stand in the spool."""
        return np.searchsorted(self.rows, rows)

    def new_column(self, name: str, kind: type[np.generic] = np.float32) -> "ColumnWriter":
        """Write one more column, in any order; it stands when the `with` block ends without an error."""
        return ColumnWriter(self, name, kind)

    def has_column(self, name: str) -> bool:
        """Whether an extra column stands."""
        return (self.directory / name).is_file()

    def drop_column(self, name: str) -> None:
        """Remove an extra column, if it stands."""
        assert name not in COLUMNS
        remove(self.directory / name)

    def _read_column(
        self, name: str, kind: type[np.generic], index: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> NDArray[Any]:
        column: NDArray[Any] = np.empty(int(offsets[-1]), dtype=kind)
        view, width = bytes_of(column), column.itemsize
        descriptor = os.open(self.directory / name, os.O_RDONLY)
        try:
            for first, last in _neighbours(index):
                begin, end = int(offsets[first]) * width, int(offsets[last + 1]) * width
                place = int(self.offsets[index[first]]) * width
                while begin < end:
                    got = os.preadv(descriptor, [view[begin:end]], place)
                    if got == 0:
                        raise SpoolDamaged(f"{self.directory / name} ended early")
                    begin, place = begin + got, place + got
        finally:
            os.close(descriptor)
        return column


class ColumnWriter:
    """One extra column of a spool while it is being written."""

    def __init__(self, spool: Spool, name: str, kind: type[np.generic]) -> None:
        self._spool = spool
        self._kind = kind
        self._width = np.dtype(kind).itemsize
        self._target = spool.directory / name
        self._temporary = spool.directory / f".{name}.tmp"
        self._file: File | None = None

    def __enter__(self) -> "ColumnWriter":
        self._file = File(self._temporary, "create")
        self._file.truncate(self._spool.num_tokens * self._width)
        return self

    def write(self, index: NDArray[np.int64], column: NDArray[Any]) -> None:
        """Write the tokens of some rollouts.

        Args:
            index: int64 [m], places in the spool.
            column: of the column's dtype, the tokens of those rollouts end to end.

        Raises:
            ValueError: the column has more or fewer numbers than the rollouts have tokens.
            OSError: the disk is full.
        """
        tokens = int(self._spool.lengths[index].sum())
        if len(column) != tokens:
            raise ValueError(f"{len(column)} numbers for rollouts of {tokens} tokens")
        assert self._file is not None
        data = bytes_of(np.ascontiguousarray(column, dtype=self._kind))
        begin = 0
        for first, last in _neighbours(index):
            place = int(self._spool.offsets[index[first]]) * self._width
            end = begin + int(self._spool.offsets[index[last] + 1]) * self._width - place
            self._file.write_at(data[begin:end], place)
            begin = end

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        try:
            with self._file:
                if error is None:
                    self._file.sync()
            if error is None:
                rename(self._temporary, self._target)
                sync_directory(self._target.parent)
        finally:
            remove(self._temporary)


def bytes_of(array: NDArray[Any]) -> memoryview:
    """The memory of a contiguous array, without copying it."""
    return memoryview(array.view(np.uint8))  # type: ignore[arg-type]


def _neighbours(index: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Runs (first, last) of `index` whose rollouts stand side by side in the files."""
    if not len(index):
        return []
    breaks = np.flatnonzero(np.diff(index) != 1)
    firsts = [0, *(breaks + 1).tolist()]
    lasts = [*breaks.tolist(), len(index) - 1]
    return list(zip(firsts, lasts, strict=True))
