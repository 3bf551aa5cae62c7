"""List columns of Arrow as flat numpy arrays and lengths."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from critic_train.rollouts import offsets_of, spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Ragged:
    """A list column of n rows with T elements in all.

    Attributes:
        flat: [T], the elements end to end; 0 where they are null. May be a read-only view of Arrow memory.
        lengths: int64 [n]; 0 for a null row.
        null_rows: bool [n], the row is null or one of its elements is.
        null_lists: bool [n], the row is null.
        null_items: bool [T], the element is null; None where none is.
    """

    flat: NDArray[Any]
    lengths: NDArray[np.int64]
    null_rows: NDArray[np.bool_]
    null_lists: NDArray[np.bool_]
    null_items: NDArray[np.bool_] | None = None

    @property
    def offsets(self) -> NDArray[np.int64]:
        """int64 [n+1], first element of each row."""
        return offsets_of(self.lengths)


def ragged(column: pa.Array) -> Ragged:
    """Any kind of Arrow list (list, large_list, fixed_size_list, list views; sliced or not) as a Ragged."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    null_rows = null_lists = column.is_null().to_numpy(zero_copy_only=False)
    items = column.flatten()
    null_items = None
    if items.null_count:
        null_items = items.is_null().to_numpy(zero_copy_only=False)
        null_rows = null_lists | rows_with(null_items, lengths)
        items = pc.fill_null(items, pa.scalar(0).cast(items.type))
    flat = items.to_numpy(zero_copy_only=False)
    return Ragged(flat=flat, lengths=lengths, null_rows=null_rows, null_lists=null_lists, null_items=null_items)


def side_by_side(left: Ragged, right: Ragged) -> Ragged:
    """Every row of `left` followed by the same row of `right`; both hold integers."""
    kind = np.result_type(left.flat, right.flat)
    if kind.kind == "f":  # numpy's answer to uint64 beside a signed type; it would round large ids
        left, right, kind = _signed(left), _signed(right), np.dtype(np.int64)
    lengths = left.lengths + right.lengths
    starts = offsets_of(lengths)[:-1]
    flat = np.empty(int(lengths.sum()), dtype=kind)
    flat[spread(starts, left.lengths)] = left.flat
    flat[spread(starts + left.lengths, right.lengths)] = right.flat
    return Ragged(
        flat=flat,
        lengths=lengths,
        null_rows=left.null_rows | right.null_rows,
        null_lists=left.null_lists | right.null_lists,
    )


def rows_with(flags: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [n]: whether any element of the row is flagged."""
    return counts_of(flags, lengths) > 0


def counts_of(flags: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [n]: flagged elements of each row."""
    offsets = offsets_of(lengths)
    at = np.flatnonzero(flags)
    return np.diff(np.searchsorted(at, offsets))


def first_of(flags: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [n]: place of the first flagged element in each row; the row's length where there is none."""
    offsets = offsets_of(lengths)
    at = np.flatnonzero(flags)
    if not len(at):
        return lengths.copy()
    after = np.searchsorted(at, offsets[:-1])
    first = np.where(after < len(at), at[np.minimum(after, len(at) - 1)], offsets[-1])
    found: NDArray[np.int64] = np.minimum(first, offsets[1:]) - offsets[:-1]
    return found


def _signed(column: Ragged) -> Ragged:
    """As int64; what lies beyond stays beyond any vocabulary."""
    flat = np.minimum(column.flat, np.iinfo(np.int64).max).astype(np.int64)
    return replace(column, flat=flat)
