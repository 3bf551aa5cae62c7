"""From sums to figures: the metrics of each prediction, as plain numbers or None."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from critic_train.evaluation.moments import Floats, Integers, Moments, pool, pool_all
from critic_train.evaluation.resampling import ROUNDING, Resampled, percentile_interval


def explained_variance(error_squares: float, return_squares: float) -> float | None:
    """1 - Var(G - V) / Var(G); None where the returns do not vary.

    The definition of Baselines, CleanRL and verl (`critic/vf_explained_var`), without verl's 1e-5 in the
    denominator. A constant offset of V costs nothing: `bias` shows it.

    Args:
        error_squares: sum of squares of G - V about its mean.
        return_squares: sum of squares of G about its mean.
    """
    if return_squares <= 0.0:
        return None
    figure = 1.0 - error_squares / return_squares
    return 0.0 if abs(figure) < ROUNDING else figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Population:
    """The rollouts that all predictions are judged on, sorted by prompt group.

    Attributes:
        order: int64 [m], from this order to the order of arrival.
        group: int64 [m], index of each rollout's prompt group, rising from 0.
        groups: number of prompt groups.
        rows: int64 [m], place of each rollout in the data set.
        returns: moments of each rollout's returns.
        by_position: moments of the returns at each response position.
        slices: column -> (its values, int64 [m] index of each rollout's value).
    """

    order: Integers
    group: Integers
    groups: int
    rows: Integers
    returns: Moments
    by_position: Moments
    slices: dict[str, tuple[list[object], Integers]]

    def sort(self, moments: Moments) -> Moments:
        """Moments of each rollout's response tokens, from the order of arrival into this one."""
        return Moments(self.returns.count, moments.mean[self.order], moments.squares[self.order])

    @property
    def arrived_group(self) -> Integers:
        """int64 [m], index of each rollout's prompt group, in order of arrival."""
        group = np.empty_like(self.group)
        group[self.order] = self.group
        return group


Samples = dict[str, Floats]
"""Metric -> its figure in each resample, float64 [resamples]."""


def main_figures(errors: Moments, target: Moments, population: Population, samples: Samples) -> dict[str, Any]:
    """The metrics of one prediction that come from the moments of its errors.

    Args:
        errors: moments of each rollout's errors, in the population's order.
        target: of what is predicted.
        population: the rollouts.
        samples: of this prediction, from `samples_of`.
    """
    every = pool_all(errors)
    tokens = int(every.count[0])
    grouped = (pool(x, population.group, population.groups) for x in (errors, target))
    within = explained_variance(*(float(x.squares.sum()) for x in grouped))
    return {
        "explained_variance": explained_variance(float(every.squares[0]), float(pool_all(target).squares[0])),
        "explained_variance_interval": interval(samples, "explained_variance"),
        "explained_variance_within_group": within,
        "explained_variance_within_group_interval": interval(samples, "explained_variance_within_group"),
        "mse": mean_square(every, 0),
        "bias": float(every.mean[0]) if tokens else None,
    }


def samples_of(resampled: Resampled, error: str, target: str) -> Samples:
    """The main figures of one prediction in each resample; nothing where nothing was resampled."""
    overall, within = resampled.explained(error, target), resampled.explained_within(error, target)
    if overall is None or within is None:
        return {}
    return {
        "explained_variance": overall,
        "explained_variance_within_group": within,
        "mse": resampled.mean_square[error],
    }


def difference(of_a: float | None, of_b: float | None, a: Floats | None, b: Floats | None) -> dict[str, Any]:
    """A figure of one prediction less that of another, with the interval of the paired difference.

    Args:
        of_a: one's figure.
        of_b: the other's.
        a: one's in each resample, None where nothing was resampled.
        b: the other's, in the same resamples.
    """
    if of_a is None or of_b is None:
        return {"difference": None, "interval": None}
    paired = None if a is None or b is None else percentile_interval(a - b)
    return {"difference": of_a - of_b, "interval": paired}


def interval(samples: Samples, metric: str) -> list[float] | None:
    """The interval of a metric; None where it was not resampled."""
    return percentile_interval(samples[metric]) if metric in samples else None


def mean_square(errors: Moments, index: int) -> float | None:
    """The mean of the squares of one set; None where it is empty."""
    tokens = int(errors.count[index])
    return float(errors.mean[index] ** 2 + errors.squares[index] / tokens) if tokens else None
