"""The figures of a prediction, from the list of metrics."""

import numpy as np
import pytest

from critic_train.evaluation.metric_figures import difference, figures_of, row_figures, samples_of
from critic_train.evaluation.metric_sums import Sums
from critic_train.evaluation.metrics import METRICS, metric_named
from critic_train.evaluation.resampling import ResampledSums, Resampling
from critic_train.evaluation.worth import MOST, Worth

MANY = Resampling(groups=400, resamples=3, seed=0, effective=400.0)
NOTHING = Sums(tokens=0, error_mean=0.0, error_squares=0.0, target_squares=0.0)


def resampled(squares):
    return ResampledSums(squares=np.array(squares), within=np.array(squares), mean_square=np.array(squares))


def test_of_nothing_every_figure_is_there_and_null():
    for kind in ("values", "group_mean", "constant", "fused"):
        figures = figures_of(NOTHING, kind, {}, MANY)
        assert set(figures.values()) == {None}
        assert [m.name for m in METRICS if kind in m.kinds] == [k for k in figures if not k.endswith("_interval")]


def test_a_figure_is_followed_by_its_interval():
    sums = Sums(
        tokens=10,
        error_mean=0.5,
        error_squares=2.0,
        target_squares=4.0,
        resampled=(resampled([1.0, 2.0, 3.0]), resampled([4.0, 4.0, 4.0])),
    )
    figures = figures_of(sums, "constant", samples_of(sums, "constant"), MANY)
    assert figures["explained_variance"] == 0.5
    assert figures["explained_variance_interval"] == pytest.approx(
        np.percentile([0.25, 0.5, 0.75], [2.5, 97.5]).tolist()
    )
    assert "mse_interval" not in figures
    assert row_figures(sums, "by_length", "constant") == {"explained_variance": 0.5, "mse": 0.45, "bias": 0.5}


def test_differences_are_paired():
    found = difference(0.5, 0.2, np.array([0.5, 0.6, 0.7]), np.array([0.2, 0.3, 0.4]), MANY)
    assert (found["difference"], found["interval"]) == (pytest.approx(0.3), pytest.approx([0.3, 0.3]))
    assert difference(None, 0.2, None, None, MANY) == {"difference": None, "interval": None}
    assert difference(0.5, 0.2, None, None, MANY)["interval"] is None


def test_the_worth_in_rollouts_has_the_interval_of_its_inverse():
    drawn = np.array([0.24, 0.22, 0.26, 0.19])
    level = np.ones(4)
    worth = Worth(
        sizes=[2], own=level, floor=0.2 * level, fall=0.12 * level, critic=drawn, fused=[level], resampling=MANY
    )
    sums = Sums(tokens=10, error_mean=0.0, error_squares=1.0, target_squares=2.0, worth=worth)
    figures = figures_of(sums, "values", samples_of(sums, "values"), MANY)
    assert figures["worth_in_rollouts"] == pytest.approx(4.0)
    low, high = np.percentile((drawn[1:] - 0.2) / 0.12, [2.5, 97.5])
    assert low < 0
    assert figures["worth_in_rollouts_interval"] == [pytest.approx(1 + 1 / high), MOST]
    metric = metric_named("worth_in_rollouts")
    assert (metric.format(3.62), metric.format(24.2), metric.format(float(MOST))) == ("3.6", "24", "1024+")
    assert metric.interval_format([3.6, float(MOST)]) == "[3.6, 1024+]"
