"""Records of a dump as raw Arrow columns: whatever names and alignments the dump has, one row a rollout."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

NUMBERS = "biuf"
"""numpy's kinds of what a token column may hold."""
UNREADABLE = "records that cannot be read"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRecord:
    """A record of which nothing can be made, and why.

    `row` is its number in the source, from 0.
    """

    row: int
    column: str
    found: str
    expected: str
    reason: str = UNREADABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Some records of a source, in its order.

    Attributes:
        batch: one row a record that could be read; token columns as the source has them.
        rows: int64 [n], the number of each in the source, from 0.
        bad: those that could not be read.
        notes: what was read in a way that is not obvious, or left out, in sentences.
    """

    batch: pa.RecordBatch
    rows: NDArray[np.int64]
    bad: tuple[BadRecord, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class Rows:
    """Collects records one by one.

    Columns hold one number, text or truth a record, or a list of numbers. Where a record lacks a column that others
    have it is null there.
    """

    columns: dict[str, list[Any]] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)

    def add(self, row: int, entries: Mapping[str, Any]) -> None:
        """Keep a record."""
        for name, entry in entries.items():
            if name not in self.columns:
                self.columns[name] = [None] * len(self.numbers)
            self.columns[name].append(entry)
        self.numbers.append(row)
        for column in self.columns.values():
            if len(column) < len(self.numbers):
                column.append(None)

    def refuse(self, row: int, column: str, found: str, expected: str) -> None:
        """Count a record that is none."""
        self.bad.append(BadRecord(row=row, column=column, found=found, expected=expected))

    def records(self) -> Records:
        """What was collected."""
        arrays: dict[str, pa.Array] = {}
        for name, entries in self.columns.items():
            array = column_of(entries)
            if array is None:
                self.notes.setdefault(f"`{name}` is left out: it holds neither numbers nor one entry a record")
            else:
                arrays[name] = array
        return Records(
            batch=pa.record_batch(arrays) if arrays else pa.record_batch({"": pa.nulls(0)}),
            rows=np.asarray(self.numbers, dtype=np.int64),
            bad=tuple(self.bad),
            notes=tuple(self.notes),
        )


def column_of(entries: Sequence[Any]) -> pa.Array | None:
    """A column of any entries: lists of numbers, or one number, text or truth each; None where they are neither."""
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
        # A lone surrogate, as JSON may have, is no text in Arrow.
        return None if entry is None else entry.encode("utf-8", "replace").decode()
    return json.dumps(entry)


def ragged_column(rows: Iterable[Any]) -> pa.Array | None:
    """Lists of numbers as one list column: int64 or float64; null where there is none or it is no list of numbers.

    Returns:
        None where no list holds numbers.
    """
    arrays = [_numbers(row) for row in rows]
    there = [array for array in arrays if array is not None]
    if not there:
        return None
    kind = np.result_type(*{array.dtype for array in there if len(array)} or {np.dtype(np.int64)})
    if kind.kind == "u":
        kind = np.dtype(np.int64)
    flat = np.concatenate([array.astype(kind, copy=False) for array in there])
    offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
    np.cumsum([0 if array is None else len(array) for array in arrays], out=offsets[1:])
    missing = pa.array([array is None for array in arrays])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat), mask=missing)


def _numbers(row: Any) -> NDArray[Any] | None:
    """One list as an array; None in it counts as NaN."""
    if row is None:
        return None
    try:
        array = np.asarray(row)
        if array.dtype == object and any(entry is None for entry in row):
            array = np.asarray(row, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        return None
    return array if array.ndim == 1 and array.dtype.kind in NUMBERS else None


def matrix_column(matrix: NDArray[Any]) -> pa.Array:
    """A padded column [n, width] as lists of one length, without a copy where the matrix lies in one piece."""
    flat = pa.array(np.ascontiguousarray(matrix).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1]) if matrix.shape[1] else pa.nulls(len(matrix))
