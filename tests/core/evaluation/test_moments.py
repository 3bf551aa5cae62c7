"""Moments against numpy on the whole sets, at offsets that would cancel, and exact zeros."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from critic_train.evaluation.moments import CoMoments, Moments, join, pool, pool_all, segment_moments


def segments(x, counts):
    counts = np.array(counts)
    return segment_moments(x, np.cumsum(counts) - counts, counts, np.repeat(np.arange(len(counts)), counts))


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e9])
def test_segments_pools_and_joins_equal_the_whole_sets(offset):
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 9, 50)
    x = rng.normal(size=counts.sum()) + offset
    parts = segments(x, counts)
    owner = np.repeat(np.arange(50), counts)
    key = rng.integers(0, 5, 50)
    pooled = pool(parts, key, 6)
    first = key < 2
    zero = np.zeros(50, dtype=np.int64)
    joined = join(
        pool(parts[np.flatnonzero(first)], zero[first], 1), pool(parts[np.flatnonzero(~first)], zero[~first], 1)
    )
    # float64 holds a number near 1e9 to 1e-7: that much of each deviation is lost before anything is summed.
    close = {"rel": 1e-13, "abs": 1e-12 * max(1.0, abs(offset) / 1e3)}
    for k in range(50):
        mine = x[owner == k]
        assert parts.mean[k] == pytest.approx(mine.mean(), rel=1e-15, abs=1e-15)
        assert parts.squares[k] == pytest.approx(((mine - mine.mean()) ** 2).sum(), **close)
    for k in range(5):
        mine = x[key[owner] == k]
        assert pooled.count[k] == len(mine)
        assert pooled.squares[k] == pytest.approx(((mine - mine.mean()) ** 2).sum(), **close)
    assert (pooled.count[5], pooled.mean[5], pooled.squares[5]) == (0, 0.0, 0.0)
    for whole in (joined, pool_all(parts)):
        assert whole.mean[0] == pytest.approx(x.mean(), rel=1e-15)
        assert whole.squares[0] == pytest.approx(((x - x.mean()) ** 2).sum(), **close)


def test_an_outlier_in_front_costs_no_digits():
    x = np.concatenate([[1e8], np.random.default_rng(2).normal(size=5)])
    exact = sum((v - sum(map(float, x)) / 6) ** 2 for v in x)
    assert segments(x, [6]).squares[0] == pytest.approx(exact, rel=1e-14)
    assert segments(x, [1, 5]).squares[1] == pytest.approx(np.var(x[1:]) * 5, rel=1e-13)


@given(st.floats(-1e30, 1e30), st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_equal_numbers_have_no_variance_at_all(level, counts):
    parts = segments(np.full(sum(counts), level), counts)
    assert (parts.mean == level).all()
    assert (parts.squares == 0).all()
    whole = pool_all(parts)
    assert (whole.mean[0], whole.squares[0]) == (level, 0.0)
    pairs = CoMoments()
    for n in counts:
        pairs.add(np.full(n, level), np.arange(n) * 1.0)
    assert (pairs.mean_v, pairs.squares_v) == (level, 0.0)
    assert pairs.correlation() is None


def test_empty_sets_join_to_either_side():
    some = segments(np.array([1.0, 2.0, 4.0]), [2, 1])
    for joined in (join(Moments.empty(2), some), join(some, Moments.empty(2))):
        assert (joined.count.tolist(), joined.mean.tolist(), joined.squares.tolist()) == ([2, 1], [1.5, 4], [0.5, 0])


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_correlation_in_parts_equals_scipy(offset):
    rng = np.random.default_rng(4)
    g = rng.normal(size=1000) + offset
    v = 0.3 * g + rng.normal(size=1000)
    pairs = CoMoments()
    for part in np.split(np.arange(1000), [0, 1, 7, 500]):
        pairs.add(v[part], g[part])
    assert pairs.correlation() == pytest.approx(scipy.stats.pearsonr(v, g).statistic, abs=1e-11)
    assert pairs.mean_v == pytest.approx(v.mean(), rel=1e-14)
