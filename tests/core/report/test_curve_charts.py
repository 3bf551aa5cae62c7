"""Long curves in few points."""

import numpy as np
import pytest

from critic_train.report.curve_charts import POINTS, thinned


def test_a_short_curve_is_left_as_it_is():
    curve = thinned([1, 2, 3], [0.5, None, 2.0])
    assert (curve.x.tolist(), curve.y.tolist()) == ([1, 3], [0.5, 2.0])
    assert not curve.is_thinned


def test_a_spike_up_or_down_is_never_lost():
    up = [1.0] * 100_000
    up[70_123], up[31_007] = 50.0, -9.0
    curve = thinned(list(range(100_000)), up)
    assert len(curve.x) == POINTS
    assert curve.is_thinned
    assert (curve.high.max(), curve.low.min()) == (50.0, -9.0)
    assert curve.x[curve.high.argmax()] == pytest.approx(70_123, abs=100_000 / POINTS)
    assert curve.x[curve.low.argmin()] == pytest.approx(31_007, abs=100_000 / POINTS)


@pytest.mark.parametrize("length", [POINTS + 1, 1000, 99_991])
def test_each_point_is_the_mean_of_its_stretch(length):
    """Every value enters once: the stretches' means, weighted by their lengths, are the mean of all."""
    y = np.random.default_rng(length).normal(size=length)
    curve = thinned(list(range(length)), y.tolist())
    edges = np.linspace(0, length, POINTS + 1).round().astype(int)
    for k in (0, 17, POINTS - 1):
        part = y[edges[k] : edges[k + 1]]
        assert curve.y[k] == pytest.approx(sum(part) / len(part), abs=1e-12)
        assert (curve.low[k], curve.high[k]) == (min(part), max(part))


def test_what_is_no_number_is_left_out():
    curve = thinned([1, 2, 3, 4], [float("nan"), float("inf"), None, 1.0])
    assert curve.x.tolist() == [4]
    assert len(thinned([], []).x) == 0
