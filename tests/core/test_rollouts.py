"""Ragged columns laid end to end, against lists."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import branching_rollouts

from critic_train.rollouts import (
    Rollouts,
    concat_rollouts,
    offsets_from_lengths,
    ragged_take,
    repeat_by_length,
    rollouts_of_tokens,
)

LENGTHS = st.lists(st.integers(0, 5), max_size=8)


@given(LENGTHS)
def test_offsets_and_positions_are_those_of_a_loop(lengths):
    counts = np.array(lengths, dtype=np.int64)
    assert offsets_from_lengths(counts).tolist() == [sum(lengths[:k]) for k in range(len(lengths) + 1)]
    starts = np.arange(len(lengths), dtype=np.int64) * 100
    expected = [100 * row + k for row, length in enumerate(lengths) for k in range(length)]
    assert repeat_by_length(starts, counts).tolist() == expected


@given(LENGTHS.filter(len), st.data())
def test_chosen_rows_are_those_of_a_loop(lengths, data):
    offsets = offsets_from_lengths(np.array(lengths, dtype=np.int64))
    index = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=9))
    elements, chosen = ragged_take(offsets, np.array(index, dtype=np.int64))
    rows = [list(range(offsets[i], offsets[i + 1])) for i in index]
    assert elements.tolist() == [element for row in rows for element in row]
    assert chosen.tolist() == [sum(map(len, rows[:k])) for k in range(len(rows) + 1)]


@pytest.fixture
def rollouts() -> Rollouts:
    """Rollouts with every column."""
    plain = branching_rollouts()
    n = len(plain)
    return replace(
        plain,
        rewards=np.arange(len(plain.input_ids), dtype=np.float32),
        truncated=np.arange(n) % 3 == 0,
        labels={"task": np.array([f"task {k % 2}" for k in range(n)])},
    )


def rows_of(rollouts: Rollouts) -> list[tuple]:
    """Each rollout as a tuple of lists; a column that is not there is left out."""
    tokens = [rollouts.input_ids, rollouts.response_mask, rollouts.returns, rollouts.values, rollouts.rewards]
    columns = [rollouts.group, rollouts.row, rollouts.truncated, *rollouts.labels.values()]
    return [
        (
            *(c[rollouts.offsets[i] : rollouts.offsets[i + 1]].tolist() for c in tokens if c is not None),
            *(c[i] for c in columns if c is not None),
        )
        for i in range(len(rollouts))
    ]


def test_rollouts_are_taken_with_all_their_columns(rollouts):
    index = [4, 0, 4, len(rollouts) - 1]
    assert rows_of(rollouts.take(np.array(index))) == [rows_of(rollouts)[i] for i in index]
    assert rows_of(rollouts.take(np.array([], dtype=np.int64))) == []
    assert rollouts.lengths.tolist() == [len(row[0]) for row in rows_of(rollouts)]
    assert rollouts.response_counts.tolist() == [sum(row[1]) for row in rows_of(rollouts)]


def test_rollouts_are_put_end_to_end_in_order(rollouts):
    first, second = rollouts.take(np.array([3, 1])), rollouts.take(np.array([2]))
    assert rows_of(concat_rollouts([first, second])) == rows_of(first) + rows_of(second)
    assert concat_rollouts([first]) is first


def test_a_column_that_one_part_lacks_is_left_out(rollouts):
    first, second = rollouts.take(np.array([3, 1])), replace(rollouts.take(np.array([2])), values=None, truncated=None)
    together = concat_rollouts([first, second])
    assert (together.values, together.truncated) == (None, None)
    assert together.rewards is not None


def test_rollouts_of_tokens_alone_have_responses_after_their_prompts():
    rollouts = rollouts_of_tokens([[5, 6, 7], np.asarray([8, 9])], [2, 1])
    assert rollouts.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert rollouts.offsets.tolist() == [0, 3, 5]
    assert rollouts.response_mask.tolist() == [False, False, True, False, True]
    assert (rollouts.returns.tolist(), rollouts.values, rollouts.row.tolist()) == ([0.0] * 5, None, [0, 1])
    assert len(rollouts_of_tokens([], [])) == 0
