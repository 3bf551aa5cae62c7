"""Where a critic is good and where it is not: by position, length, column and prompt group."""

from typing import Any

import numpy as np

from critic_train.evaluation.metrics import Population, explained_variance, mean_square
from critic_train.evaluation.moments import Integers, Moments, pool, sums_by_key
from critic_train.evaluation.token_columns import distinct_edges, part_ranks

LENGTH_PARTS = 5
GROUPS_SHOWN = 5


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
                "mse": mean_square(errors, index),
                "bias": bias if tokens else None,
                "mean_value": mean_return + bias if tokens else None,
                "mean_return": mean_return if tokens else None,
            }
        )
    return table


def by_label(
    errors: Moments,
    population: Population,
    labels: list[object],
    index: Integers,
    auc: list[float | None] | None,
) -> dict[str, dict[str, Any]]:
    """Metrics of the rollouts with each value of a column.

    Args:
        errors: moments of each rollout's errors.
        population: the rollouts, in the same order.
        labels: the column's values.
        index: int64 [m], each rollout's value among them.
        auc: AUC within prompt groups for each value; None leaves the key out.
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
            "mse": mean_square(error, k),
            "bias": float(error.mean[k]),
            **({} if auc is None else {"auc_within_group": auc[k]}),
        }
        for k, label in enumerate(labels)
    }


def by_length(errors: Moments, population: Population) -> list[dict[str, Any]]:
    """Metrics of the rollouts by response length: up to LENGTH_PARTS bins of equally many rollouts, short to long.

    `from` and `to` are the fewest and the most response tokens in the bin. Rollouts of one length share a bin.

    Args:
        errors: moments of each rollout's errors.
        population: the rollouts, in the same order.
    """
    lengths = population.returns.count
    if not len(lengths):
        return []
    ordered = np.sort(lengths)
    edges = distinct_edges(int(ordered[0]), ordered[part_ranks(len(ordered), LENGTH_PARTS)])
    part = np.searchsorted(edges, lengths, side="right")
    error, returned = (pool(x, part, len(edges) + 1) for x in (errors, population.returns))
    table = []
    for k in range(len(edges) + 1):
        mine = lengths[part == k]
        table.append(
            {
                "from": int(mine.min()),
                "to": int(mine.max()),
                "rollouts": len(mine),
                "tokens": int(error.count[k]),
                "explained_variance": explained_variance(float(error.squares[k]), float(returned.squares[k])),
                "mse": mean_square(error, k),
                "bias": float(error.mean[k]),
            }
        )
    return table


def best_and_worst_groups(errors: Moments, population: Population) -> dict[str, list[dict[str, Any]]]:
    """The prompt groups with the smallest and the largest mean squared error, GROUPS_SHOWN each, none in both.

    Args:
        errors: moments of each rollout's errors, in the population's order.
        population: the rollouts.

    Returns:
        "best" and "worst" -> rows, the most telling first. `row` is the place in the data set of the group's first
        rollout; `uid` is None, for the judge does not know it.
    """
    group, groups = population.group, population.groups
    error, returned = (pool(x, group, groups) for x in (errors, population.returns))
    mse = error.mean**2 + error.squares / np.maximum(error.count, 1)
    rollouts = np.bincount(group, minlength=groups)
    first = np.searchsorted(group, np.arange(groups))
    order = np.lexsort((np.arange(groups), mse))

    def row(index: int) -> dict[str, Any]:
        mean_return = float(returned.mean[index])
        return {
            "uid": None,
            "row": int(population.rows[first[index]]),
            "rollouts": int(rollouts[index]),
            "tokens": int(error.count[index]),
            "mse": float(mse[index]),
            "mean_value": mean_return + float(error.mean[index]),
            "mean_return": mean_return,
        }

    most = min(GROUPS_SHOWN, groups // 2)
    return {
        "best": [row(k) for k in order[: min(GROUPS_SHOWN, groups - most)].tolist()],
        "worst": [row(k) for k in order[::-1][:most].tolist()],
    }


def _key(label: object) -> str:
    """A label as a JSON key; booleans as JSON writes them."""
    return str(label).lower() if isinstance(label, bool) else str(label)
