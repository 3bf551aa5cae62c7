"""Order statistics against a sort."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from critic_train.evaluation.token_columns import distinct_edges, order_statistics, part_ranks

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(
    arrays.arrays(np.float32, st.integers(1, 60), elements=st.one_of(FLOATS, st.sampled_from([0.0, -0.0, 0.5]))),
    st.integers(1, 4),
)
def test_order_statistics_equal_a_sort(x, blocks):
    found = order_statistics(lambda: iter(np.array_split(x, blocks)), np.arange(len(x)))
    assert found.dtype == np.float32
    assert (found == np.sort(x)).all()


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_quantiles_of_many_numbers(offset):
    x = (np.random.default_rng(0).normal(size=50_003) + offset).astype(np.float32)
    ranks = part_ranks(len(x), 10)
    assert ranks.tolist() == [5000, 10000, 15000, 20001, 25001, 30001, 35002, 40002, 45002]
    assert (order_statistics(lambda: iter(np.array_split(x, 7)), ranks) == np.sort(x)[ranks]).all()


def test_bins_that_begin_at_the_same_number_are_one():
    assert distinct_edges(0.0, np.array([0.0, 0.0, 0.5, 0.5, 1.0], dtype=np.float32)).tolist() == [0.5, 1.0]
    assert len(distinct_edges(0.5, np.array([0.5, 0.5], dtype=np.float32))) == 0
