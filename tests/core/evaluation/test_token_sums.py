"""Responses cut into parts, and the table of rollouts."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from critic_train.evaluation.token_sums import Cells, RolloutTable


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 12))
def test_token_k_of_n_is_in_part_k_positions_over_n(lengths, positions):
    cells = Cells.of(np.array(lengths), positions)
    expected = [(i, k * positions // n) for i, n in enumerate(lengths) for k in range(n)]
    assert list(zip(cells.rollout[cells.owner], cells.position[cells.owner], strict=True)) == expected
    assert (cells.counts == np.bincount(cells.owner)).all()
    assert (cells.starts == np.searchsorted(cells.owner, np.arange(len(cells.counts)))).all()


def test_labels_are_in_their_own_order_and_nan_is_one_label():
    table = RolloutTable(["score"])
    nan = float("nan")
    for scores in ([2.0, nan], [nan, 1.0]):
        rows = np.arange(2)
        table.add(rows, rows, rows + 1, {"score": np.array(scores)})
    values, index = table.labels("score")
    assert values == [1.0, 2.0, "nan"]
    assert index.tolist() == [1, 2, 2, 0]


def test_labels_of_files_that_disagree_on_the_type():
    table = RolloutTable(["task"])
    for labels in (np.array(["b", "a"], dtype=object), np.array([10, 9])):
        table.add(np.arange(2), np.arange(2), np.ones(2, np.int64), {"task": labels})
    values, index = table.labels("task")
    assert values == [10, 9, "a", "b"]
    assert index.tolist() == [3, 2, 0, 1]
