"""The leave-one-out mean against a loop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from critic_train.evaluation.moments import leave_one_out


@given(
    st.lists(st.tuples(st.integers(0, 4), st.floats(-5, 5)), min_size=1, max_size=30),
    st.sampled_from([0.0, 1e6]),
)
def test_leave_one_out_equals_a_loop(pairs, offset):
    keys, group = np.unique([g for g, _ in pairs], return_inverse=True)
    means = np.array([r for _, r in pairs]) + offset
    found, lone = leave_one_out(means, group, -9.0)
    expected_lone = 0
    for i in range(len(means)):
        others = [means[j] for j in range(len(means)) if j != i and group[j] == group[i]]
        expected_lone += not others
        expected = sum(others) / len(others) if others else -9.0
        assert found[i] == pytest.approx(expected, rel=1e-14, abs=1e-13)
    assert lone == expected_lone
    assert len(keys) > lone or len(means) == lone


def test_equal_returns_have_exactly_their_own_mean():
    found, _ = leave_one_out(np.full(7, 0.1), np.zeros(7, dtype=np.int64), 0.0)
    assert (found == 0.1).all()
