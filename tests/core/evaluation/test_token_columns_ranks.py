"""Spearman's correlation against scipy, exact and by histogram, and the error bound of the latter."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from critic_train.evaluation.token_columns import RankCorrelation, centred_ranks, sortable

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def blocks(x, size=1000):
    return lambda: iter(np.split(x, range(size, len(x), size)))


def pairs(kind, n=20000):
    rng = np.random.default_rng(3)
    g = rng.normal(size=n)
    v = 0.5 * g + rng.normal(size=n)
    if kind == "ties":
        g, v = np.round(g), np.round(4 * v) / 4
    elif kind == "offset":
        g, v = g + 1e6, v + 1e6
    elif kind == "wide":
        g, v = np.sinh(8 * g), np.sinh(8 * v)
    elif kind == "binary":
        g = (g > 0.5).astype(float)
    return v.astype(np.float32), g.astype(np.float32)


@given(st.lists(FLOATS, min_size=1, max_size=40))
def test_ranks_are_average_ranks(numbers):
    x = np.array(numbers, dtype=np.float32)
    assert centred_ranks(x) == pytest.approx(scipy.stats.rankdata(x) - (len(x) + 1) / 2, abs=1e-12)


@given(FLOATS, FLOATS)
def test_sortable_integers_keep_the_order(a, b):
    x, y = sortable(np.array([a, b], dtype=np.float32))
    assert (x < y, x == y) == (a < b, a == b)


@pytest.mark.parametrize("kind", ["plain", "ties", "offset", "wide", "binary"])
def test_exact_ranks_equal_scipy(kind):
    v, g = pairs(kind)
    ranks = RankCorrelation(blocks(g), len(g))
    assert ranks.against(blocks(v)) == pytest.approx(scipy.stats.spearmanr(v, g).statistic, abs=1e-12)
    assert ranks.error_bound == 0.0


@pytest.mark.parametrize("kind", ["plain", "ties", "offset", "wide", "binary"])
@pytest.mark.parametrize("bins", [2**22, 2**14, 2**9])
def test_the_histogram_stays_within_its_error_bound(kind, bins):
    v, g = pairs(kind)
    ranks = RankCorrelation(blocks(g), len(g), exact_tokens=10, bins=bins)
    error = abs(ranks.against(blocks(v)) - scipy.stats.spearmanr(v, g).statistic)
    assert error <= ranks.error_bound + 1e-12
    if bins == 2**22:
        assert ranks.error_bound < 5e-4
        assert error < 1e-6
    if kind == "offset" and bins >= 2**14:
        assert ranks.error_bound == 0.0  # so few float32 numbers lie around 1e6 that each has its bin


@pytest.mark.parametrize("exact_tokens", [0, 100])
def test_what_does_not_vary_has_no_correlation(exact_tokens):
    flat = np.full(50, 0.3, dtype=np.float32)
    rising = np.arange(50, dtype=np.float32)
    for g, v in ((flat, rising), (rising, flat)):
        assert RankCorrelation(blocks(g), 50, exact_tokens=exact_tokens).against(blocks(v)) is None
    assert RankCorrelation(blocks(rising), 50, exact_tokens=exact_tokens).against(blocks(-rising)) == -1.0
