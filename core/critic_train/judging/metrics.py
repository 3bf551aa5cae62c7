"""From sums to figures: the metrics of each prediction, as plain numbers or None."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from critic_train.judging.bootstrap import percentile_interval, resampled_sums
from critic_train.judging.moments import Floats, Integers, Moments, pool, pool_all, sums_by_key
from critic_train.judging.statistics import PredictionSums

# 1 - a / b cannot tell a difference below a few thousand roundings from none.
ROUNDING = 1e-12


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


def _explained_variances(error_squares: Floats, return_squares: Floats) -> Floats:
    """The same, element by element; NaN where the returns do not vary."""
    figures = np.full(len(error_squares), np.nan)
    varied = return_squares > 0.0
    figures[varied] = 1.0 - error_squares[varied] / return_squares[varied]
    figures[np.abs(figures) < ROUNDING] = 0.0
    return figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Population:
    """The rollouts that all predictions are judged on, sorted by prompt group.

    Attributes:
        order: int64 [m], from this order to the order of arrival.
        group: int64 [m], index of each rollout's prompt group, rising from 0.
        groups: number of prompt groups.
        returns: moments of each rollout's returns.
        by_position: moments of the returns at each response position.
        slices: column -> (its values, int64 [m] index of each rollout's value).
    """

    order: Integers
    group: Integers
    groups: int
    returns: Moments
    by_position: Moments
    slices: dict[str, tuple[list[object], Integers]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resampled:
    """Explained variance of each prediction in each resample, float64 [resamples]; NaN where there is none."""

    overall: dict[str, Floats]
    within: dict[str, Floats]


def resample(population: Population, errors: dict[str, Moments], resamples: int, seed: int) -> Resampled:
    """Bootstrap over prompt groups, the same draws for every prediction.

    Args:
        population: the rollouts; below two prompt groups nothing can be resampled.
        errors: name -> moments of each rollout's errors, in the population's order.
        resamples: number of resamples.
        seed: of the draws.
    """
    if population.groups < 2:
        return Resampled(overall={}, within={})
    quantities = [population.returns, *errors.values()]
    grouped = [pool(q, population.group, population.groups) for q in quantities]
    columns = [grouped[0].count.astype(np.float64)]
    for part in grouped:
        # About the mean over all, so that the resampled variance does not cancel.
        distance = part.mean - pool_all(part).mean[0]
        columns += [
            part.count * distance,
            part.squares + part.count * distance**2,
            part.squares,
        ]
    sums = resampled_sums(np.stack(columns, axis=1), resamples, seed)
    tokens = sums[:, 0]

    def spread(index: int) -> tuple[Floats, Floats]:
        first, second, within = sums[:, 1 + 3 * index : 4 + 3 * index].T
        squares = second - first**2 / tokens
        squares[squares <= ROUNDING * second] = 0.0
        return squares, within

    overall, within = {}, {}
    all_returns, within_returns = spread(0)
    for index, name in enumerate(errors, start=1):
        all_errors, within_errors = spread(index)
        overall[name] = _explained_variances(all_errors, all_returns)
        within[name] = _explained_variances(within_errors, within_returns)
    return Resampled(overall=overall, within=within)


def figures(
    name: str, sums: PredictionSums, errors: Moments, population: Population, resampled: Resampled
) -> dict[str, Any]:
    """The metrics of one prediction that come from sums, in the order in which they are shown.

    Args:
        name: the prediction's, in `resampled`.
        sums: what was kept of it.
        errors: moments of each rollout's errors, in the population's order.
        population: the rollouts.
        resampled: explained variances in each resample.
    """
    every = pool_all(errors)
    tokens = int(every.count[0])
    grouped = (pool(x, population.group, population.groups) for x in (errors, population.returns))
    within = explained_variance(*(float(x.squares.sum()) for x in grouped))
    return {
        "explained_variance": explained_variance(
            float(every.squares[0]), float(pool_all(population.returns).squares[0])
        ),
        "explained_variance_interval": _interval(resampled.overall.get(name)),
        "explained_variance_within_group": within,
        "explained_variance_within_group_interval": _interval(resampled.within.get(name)),
        "mse": _mean_square(every, 0),
        "mae": sums.absolute / tokens if tokens else None,
        "bias": float(every.mean[0]) if tokens else None,
        "pearson": sums.pairs.correlation(),
        "by_position": by_position(sums.error.by_position, population.by_position),
        "by": {
            column: by_label(errors, population, labels, index) for column, (labels, index) in population.slices.items()
        },
    }


def difference(a: str, b: str, metrics: dict[str, dict[str, Any]], resampled: Resampled) -> dict[str, Any]:
    """Explained variance of a less that of b, with the interval of the paired difference.

    Args:
        a: a prediction's name.
        b: another's.
        metrics: name -> its metrics.
        resampled: explained variances in each resample.
    """
    of_a, of_b = metrics[a]["explained_variance"], metrics[b]["explained_variance"]
    if of_a is None or of_b is None:
        return {"difference": None, "interval": None}
    paired = resampled.overall[a] - resampled.overall[b] if resampled.overall else None
    return {"difference": of_a - of_b, "interval": _interval(paired)}


def by_position(errors: Moments, returns: Moments) -> list[dict[str, Any]]:
    """Metrics at each equal part of the response, first to last; `from` and `to` are shares of its length."""
    parts = len(errors.count)
    table = []
    for index in range(parts):
        tokens = int(errors.count[index])
        mean_return = float(returns.mean[index])
        bias = float(errors.mean[index])
        table.append(
            {
                "from": index / parts,
                "to": (index + 1) / parts,
                "tokens": tokens,
                "explained_variance": explained_variance(float(errors.squares[index]), float(returns.squares[index])),
                "mse": _mean_square(errors, index),
                "bias": bias if tokens else None,
                "mean_value": mean_return + bias if tokens else None,
                "mean_return": mean_return if tokens else None,
            }
        )
    return table


def by_label(
    errors: Moments, population: Population, labels: list[object], index: Integers
) -> dict[str, dict[str, Any]]:
    """Metrics of the rollouts with each value of a column.

    Args:
        errors: moments of each rollout's errors.
        population: the rollouts, in the same order.
        labels: the column's values.
        index: int64 [m], each rollout's value among them.
    """
    slices = len(labels)
    error, returned = (pool(x, index, slices) for x in (errors, population.returns))
    # A column may differ within a prompt group: groups are cut along it.
    cut, part = np.unique(index * population.groups + population.group, return_inverse=True)
    inside = [
        sums_by_key(pool(x, part, len(cut)).squares, cut // population.groups, slices)
        for x in (errors, population.returns)
    ]
    rollouts = np.bincount(index, minlength=slices)
    return {
        _key(label): {
            "tokens": int(error.count[k]),
            "rollouts": int(rollouts[k]),
            "explained_variance": explained_variance(float(error.squares[k]), float(returned.squares[k])),
            "explained_variance_within_group": explained_variance(float(inside[0][k]), float(inside[1][k])),
            "mse": _mean_square(error, k),
            "bias": float(error.mean[k]),
        }
        for k, label in enumerate(labels)
    }


def _mean_square(errors: Moments, index: int) -> float | None:
    tokens = int(errors.count[index])
    return float(errors.mean[index] ** 2 + errors.squares[index] / tokens) if tokens else None


def _interval(resampled: Floats | None) -> list[float] | None:
    return None if resampled is None else percentile_interval(resampled)


def _key(label: object) -> str:
    """A label as a JSON key; booleans as JSON writes them."""
    return str(label).lower() if isinstance(label, bool) else str(label)
