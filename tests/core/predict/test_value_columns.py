"""Whitening batch by batch, and new columns handed out by rows of the file."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from critic_train.predict.value_columns import KIND, ColumnBatch, ColumnStream, Whitening, with_columns
from critic_train.rollouts import offsets_from_lengths

NUMBERS = st.lists(st.lists(st.floats(-100, 100), max_size=6), min_size=1, max_size=6)


@given(NUMBERS)
def test_whitening_by_batches_is_that_of_all_numbers(batches):
    whitening = Whitening()
    for batch in batches:
        whitening.add(np.array(batch))
    numbers = np.concatenate([np.array(batch) for batch in batches])
    assert whitening.count == len(numbers)
    if len(numbers) > 1:
        expected = (numbers - numbers.mean()) / np.sqrt(numbers.var(ddof=1) + 1e-8)
        np.testing.assert_allclose(whitening.apply(numbers), expected, rtol=1e-5, atol=1e-4)


def test_one_number_alone_is_0_after_whitening():
    whitening = Whitening()
    whitening.add(np.array([3.0]))
    assert whitening.apply(np.array([3.0])).tolist() == [0.0]


def piece(rows):
    """New columns of the rows of these numbers: row k has k % 3 tokens, each k."""
    lengths = np.array([row % 3 for row in rows], dtype=np.int64)
    return ColumnBatch(
        row=np.array(rows, dtype=np.int64),
        offsets=offsets_from_lengths(lengths),
        columns={"values": np.repeat(np.array(rows, dtype=np.float32), lengths)},
        present={"values": np.ones(len(rows), dtype=bool)},
    )


def test_rows_are_handed_out_once_and_in_order_however_they_are_cut():
    pieces = [[0, 1, 4], [5], [6, 8, 9], [12]]
    for ends in ([13], [1, 3, 7, 13], [5, 6, 13], list(range(1, 14)), [4, 4, 12, 20]):
        stream, seen, start = ColumnStream(iter(map(piece, pieces))), [], 0
        for end in ends:
            for part in stream.upto(end):
                assert all(start <= row < end for row in part.row)
                assert part.columns["values"].tolist() == [row for row in part.row for _ in range(row % 3)]
                seen += part.row.tolist()
            start = end
        assert seen == [row for rows in pieces for row in rows]


def test_a_column_is_replaced_in_place_or_added_at_the_end():
    metadata = {b"huggingface": b"{}", b"mine": b"1"}
    schema = pa.schema([("values", pa.list_(pa.float64())), ("uid", pa.string())], metadata=metadata)
    written = with_columns(schema, ["values", "returns"])
    assert (written.names, written.field("values").type) == (["values", "uid", "returns"], KIND)
    assert written.metadata == {b"mine": b"1"}
