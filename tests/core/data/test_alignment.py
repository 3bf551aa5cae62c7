"""Every kind of Arrow list, sliced, chunked or with nulls, becomes the same flat column."""

from itertools import chain

import numpy as np
import pyarrow as pa
import pytest

from critic_train.data.alignment import counts_of, first_of, ragged, rows_with, side_by_side
from critic_train.data.writing import numpy_dtype
from critic_train.rollouts import offsets_from_lengths, repeat_by_length

ROWS = [[1, 2], [3, 4], None, [5, 6], [7, None]]
LISTS = {
    "list": pa.list_,
    "large_list": pa.large_list,
    "fixed_size_list": lambda item: pa.list_(item, 2),
    "list_view": pa.list_view,
    "large_list_view": pa.large_list_view,
}
ITEMS = {
    np.int8: pa.int8(),
    np.int16: pa.int16(),
    np.int32: pa.int32(),
    np.int64: pa.int64(),
    np.uint8: pa.uint8(),
    np.uint16: pa.uint16(),
    np.uint32: pa.uint32(),
    np.uint64: pa.uint64(),
    np.float16: pa.float16(),
    np.float32: pa.float32(),
    np.float64: pa.float64(),
}


@pytest.mark.parametrize("item", ITEMS)
@pytest.mark.parametrize("kind", LISTS)
def test_kinds_of_lists_and_numbers(kind: str, item: type[np.number]) -> None:
    rows = [row and [None if x is None else item(x) for x in row] for row in ROWS]
    column = pa.array(rows, type=LISTS[kind](ITEMS[item]))
    for start, stop in ((0, 5), (1, 4), (2, 3), (3, 5), (0, 2), (5, 5)):
        found = ragged(column[start:stop])
        expected = [[0 if x is None else x for x in row or []] for row in ROWS[start:stop]]
        assert found.lengths.tolist() == [len(row) for row in expected]
        assert found.flat.tolist() == list(chain.from_iterable(expected))
        assert found.flat.dtype == item
        assert found.null_rows.tolist() == [row is None or None in row for row in ROWS[start:stop]]


@pytest.mark.parametrize("item", ITEMS)
def test_numpy_names_the_types_of_arrow(item: type[np.number]) -> None:
    assert numpy_dtype(ITEMS[item]) == np.dtype(item)


@pytest.mark.parametrize("kind", LISTS)
def test_booleans(kind: str) -> None:
    rows = [[True, False], [None, True], None, [False, False]]
    found = ragged(pa.array(rows, type=LISTS[kind](pa.bool_())))
    assert found.flat.tolist() == [True, False, False, True, False, False]
    assert found.null_rows.tolist() == [False, True, True, False]


def test_what_lies_under_a_null_row_is_left_out() -> None:
    offsets, mask = pa.array([0, 2, 4, 5], pa.int32()), pa.array([False, True, False])
    column = pa.ListArray.from_arrays(offsets, pa.array([1, 2, 8, 9, 3]), mask=mask)
    assert ragged(column).flat.tolist() == [1, 2, 3]
    assert ragged(column).lengths.tolist() == [2, 0, 1]


def test_empty_rows_and_no_rows() -> None:
    assert ragged(pa.array([[], [1], []], pa.list_(pa.int32()))).offsets.tolist() == [0, 0, 1, 1]
    assert ragged(pa.array([], pa.list_(pa.int32()))).lengths.tolist() == []


def test_side_by_side_of_signed_and_unsigned_stays_exact() -> None:
    left = ragged(pa.array([[2**64 - 1, 2**53 + 1], []], pa.list_(pa.uint64())))
    right = ragged(pa.array([[-1], [5]], pa.list_(pa.int64())))
    both = side_by_side(left, right)
    assert both.flat.dtype == np.int64
    assert both.flat.tolist() == [2**63 - 1, 2**53 + 1, -1, 5]
    assert both.lengths.tolist() == [3, 1]


def test_rows_and_places() -> None:
    lengths = np.array([2, 0, 3, 1])
    flags = np.array([0, 1, 0, 0, 0, 1], dtype=bool)
    assert offsets_from_lengths(lengths).tolist() == [0, 2, 2, 5, 6]
    assert repeat_by_length(np.array([10, 0, 20, 30]), lengths).tolist() == [10, 11, 20, 21, 22, 30]
    assert rows_with(flags, lengths).tolist() == [True, False, False, True]
    assert counts_of(flags, lengths).tolist() == [1, 0, 0, 1]
    assert first_of(flags, lengths).tolist() == [1, 0, 3, 0]
