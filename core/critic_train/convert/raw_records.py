"""How a dump format is declared, and its records as raw Arrow columns under the dump's own names, one row a rollout."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

NUMBERS = "biuf"
"""numpy's dtype kinds of what a token column may hold."""
UNREADABLE = "records that cannot be read"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRecord:
    """A record that cannot be used, and why.

    Attributes:
        row: its number in the source, from 0.
        column: the field that is at fault, "" where it is the record.
        actual, expected: what the field holds and should hold, in words.
        reason: under which such records are counted.
    """

    row: int
    column: str
    actual: str
    expected: str
    reason: str = UNREADABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Some records of a source, in its order.

    Attributes:
        batch: one row a record that could be read; token columns as the source has them.
        rows: int64 [n], the number of each in the source, from 0.
        bad: those that could not be read.
        notes: sentences on fields that were left out, or read in a way that is not obvious.
    """

    batch: pa.RecordBatch
    rows: NDArray[np.int64]
    bad: tuple[BadRecord, ...] = ()
    notes: tuple[str, ...] = ()


Line = tuple[int, dict[str, Any]]
"""A record's number in its source, and its fields."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectFormat:
    """A dump format of one pickled object a file.

    Attributes:
        name: the value of --from.
        title: what it reads, as error messages list it.
        recognise: object -> the kind of dump, for messages; None where it is not of this format.
        read: object -> its records.
    """

    name: str
    title: str
    recognise: Callable[[Any], str | None]
    read: Callable[[Any], Iterator[Records]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LineFormat:
    """A dump format of records, as of JSON Lines.

    Attributes:
        name: the value of --from.
        title: what it reads, as error messages list it.
        recognise: the first object of a file -> the kind of dump, for messages; None where it is not of this format.
        read: some lines, the file's name, and what makes ids of text where the format holds text -> their records.
        is_text: whether the format holds text in place of token ids.
    """

    name: str
    title: str
    recognise: Callable[[dict[str, Any]], str | None]
    read: Callable[[list[Line], str, Any], Records]
    is_text: bool = False


@dataclass(slots=True)
class Rows:
    """Collects records one by one into columns.

    A column holds one number, text or boolean a record, or a list of numbers; null where a record has no such field.
    """

    columns: dict[str, list[Any]] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)

    def add(self, row: int, entries: Mapping[str, Any]) -> None:
        """Add a record."""
        for name, entry in entries.items():
            if name not in self.columns:
                self.columns[name] = [None] * len(self.numbers)
            self.columns[name].append(entry)
        self.numbers.append(row)
        for column in self.columns.values():
            if len(column) < len(self.numbers):
                column.append(None)

    def refuse(self, row: int, column: str, actual: str, expected: str) -> None:
        """Add a record that cannot be used."""
        self.bad.append(BadRecord(row=row, column=column, actual=actual, expected=expected))

    def records(self) -> Records:
        """All that was added."""
        arrays: dict[str, pa.Array] = {}
        for name, entries in self.columns.items():
            array = column_of(entries)
            if array is None:
                self.notes.setdefault(f"`{name}` is left out: it holds neither numbers nor one entry a record")
            else:
                arrays[_text(name) or ""] = array
        return Records(
            batch=pa.record_batch(arrays) if arrays else pa.record_batch({"": pa.nulls(0)}),
            rows=np.asarray(self.numbers, dtype=np.int64),
            bad=tuple(self.bad),
            notes=tuple(self.notes),
        )


def column_of(entries: Sequence[Any]) -> pa.Array | None:
    """A column of lists of numbers, or of one number, text or boolean each; None where entries are neither."""
    kinds = {type(entry) for entry in entries} - {type(None)}
    if not kinds:
        return pa.nulls(len(entries))
    if all(issubclass(kind, list | tuple | np.ndarray) for kind in kinds):
        return ragged_column(entries)
    if kinds <= {bool}:
        return pa.array(entries, type=pa.bool_())
    if kinds <= {int} and all(-(2**63) <= entry < 2**63 for entry in entries if entry is not None):
        return pa.array(entries, type=pa.int64())
    if kinds <= {int, float, bool} and bool not in kinds:
        return pa.array([None if entry is None else float(entry) for entry in entries], type=pa.float64())
    if kinds <= {str, int, float, bool}:
        return pa.array([_text(entry) for entry in entries], type=pa.string())
    return None


def _text(entry: Any) -> str | None:
    if entry is None or isinstance(entry, str):
        # Arrow takes no lone surrogates; JSON and pickles may have them.
        return None if entry is None else entry.encode("utf-8", "replace").decode()
    return json.dumps(entry)


def ragged_column(rows: Iterable[Any]) -> pa.Array | None:
    """Lists of numbers as one list column, int64 or float64; null for entries that are no list of numbers.

    Returns:
        None where no entry is a list of numbers.
    """
    arrays = [_numbers(row) for row in rows]
    lists = [array for array in arrays if array is not None]
    if not lists:
        return None
    dtype = np.result_type(*{array.dtype for array in lists if len(array)} or {np.dtype(np.int64)})
    if dtype.kind == "u":
        dtype = np.dtype(np.int64)
    flat = np.concatenate([array.astype(dtype, copy=False) for array in lists])
    offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
    np.cumsum([0 if array is None else len(array) for array in arrays], out=offsets[1:])
    missing = pa.array([array is None for array in arrays])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat), mask=missing)


def _numbers(row: Any) -> NDArray[Any] | None:
    """One list as an array, None in it as NaN; None where it is no list of numbers."""
    if row is None or (isinstance(row, list | tuple) and row and isinstance(row[0], list | tuple)):
        return None
    try:
        array = np.asarray(row.tolist() if isinstance(row, np.ndarray) and row.dtype == object else row)
        if array.dtype == object and any(entry is None for entry in row):
            array = np.asarray(row, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        return None
    return array if array.ndim == 1 and array.dtype.kind in NUMBERS else None


def matrix_column(matrix: NDArray[Any]) -> pa.Array:
    """A padded column [n, width] as lists of one length; no copy where the matrix is contiguous."""
    flat = pa.array(np.ascontiguousarray(matrix).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1]) if matrix.shape[1] else pa.nulls(len(matrix))
