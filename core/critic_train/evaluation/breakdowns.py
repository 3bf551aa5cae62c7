"""Tables of where a critic is good and where it is not: by value, position, length, column and prompt group."""

from typing import Any

import numpy as np

from critic_train.evaluation.auc import Discrimination
from critic_train.evaluation.metric_figures import row_figures
from critic_train.evaluation.metric_sums import Sums
from critic_train.evaluation.metrics import Kind
from critic_train.evaluation.moments import Floats, Integers, Moments, TokenColumn, pool, sums_by_key
from critic_train.evaluation.resampling import Resampling
from critic_train.evaluation.token_columns import distinct_edges, part_ranks
from critic_train.evaluation.token_sums import Block, Population

LENGTH_PARTS = 5
GROUPS_SHOWN = 5
HISTOGRAM_BINS = 40


class CalibrationSums:
    """Tokens by bins of predicted value: counts and sums of values and returns, by prompt group."""

    def __init__(self, edges: TokenColumn, group: Integers, groups: int) -> None:
        """Args:
        edges: float32 [bins - 1], rising; a token's bin is the number of edges at or below its value.
        group: int64 [m], the prompt group of each rollout in order of arrival, from 0.
        groups: their number.
        """
        self._edges, self._group = edges, group
        self._bins = len(edges) + 1
        self._sums = np.zeros((3, groups, self._bins))
        self._rollouts = np.zeros(self._bins, dtype=np.int64)

    def add(self, block: Block) -> None:
        """Take in a block."""
        rollouts = len(block.lengths)
        cell = block.owner * self._bins + np.searchsorted(self._edges, block.values, side="right")
        for index, weights in enumerate((None, block.values, block.returns)):
            sums = np.bincount(cell, weights=weights, minlength=rollouts * self._bins).reshape(rollouts, self._bins)
            np.add.at(self._sums[index], self._group[block.rollouts], sums)
            if weights is None:
                self._rollouts += np.count_nonzero(sums, axis=0)

    def table(self, bounds: tuple[float, float], resampling: Resampling) -> list[dict[str, Any]]:
        """A row for each bin, rising.

        Args:
            bounds: the smallest and the largest value.
            resampling: of the prompt groups.
        """
        tokens, value, returned = (part.sum(axis=0) for part in self._sums)
        mean_return = returned / np.maximum(tokens, 1)
        intervals: list[list[float] | None] = [None] * self._bins
        if self._sums.shape[1] >= 2:
            # Distances from the mean, so that the sums of a resample do not cancel.
            distance = self._sums[2] - self._sums[0] * mean_return
            sums = resampling.sums(np.concatenate([self._sums[0], distance], axis=1))
            drawn, apart = sums[:, : self._bins], sums[:, self._bins :]
            with np.errstate(invalid="ignore"):
                samples = (mean_return + apart / drawn).T
            intervals = [resampling.interval(float(x), column) for x, column in zip(mean_return, samples, strict=True)]
        edges = [bounds[0], *self._edges.tolist(), bounds[1]]
        return [
            {
                "from": float(edges[k]),
                "to": float(edges[k + 1]),
                "tokens": int(tokens[k]),
                "rollouts": int(self._rollouts[k]),
                "mean_value": float(value[k] / tokens[k]),
                "mean_return": float(mean_return[k]),
                "interval": intervals[k],
            }
            for k in range(self._bins)
            if tokens[k]
        ]


class Histogram:
    """Counts of tokens in equal bins; what lies beyond the bins is counted apart."""

    def __init__(self, low: float, high: float) -> None:
        """Args:
        low: the left edge of the first bin.
        high: the right edge of the last, which belongs to it; one number alone gets half a unit on either side.
        """
        self._low, self._high = (low - 0.5, high + 0.5) if low == high else (low, high)
        self._counts = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
        self._below = self._above = 0

    def add(self, x: TokenColumn) -> None:
        """Take in float32 [T]."""
        wide = x.astype(np.float64)
        self._counts += np.histogram(wide, bins=HISTOGRAM_BINS, range=(self._low, self._high))[0]
        self._below += int(np.count_nonzero(wide < self._low))
        self._above += int(np.count_nonzero(wide > self._high))

    def figures(self) -> dict[str, Any]:
        """{edges: HISTOGRAM_BINS + 1 numbers, counts: HISTOGRAM_BINS, below, above}."""
        edges: Floats = np.linspace(self._low, self._high, HISTOGRAM_BINS + 1)
        return {
            "edges": edges.tolist(),
            "counts": self._counts.tolist(),
            "below": self._below,
            "above": self._above,
        }


def by_position(errors: Moments, returns: Moments, kind: Kind) -> list[dict[str, Any]]:
    """Metrics at each equal part of the response, first to last; `from` and `to` are shares of its length."""
    parts = len(errors.count)
    table = []
    for index in range(parts):
        sums = Sums.of(errors, returns, index)
        mean_return = float(returns.mean[index])
        table.append(
            {
                "from": index / parts,
                "to": (index + 1) / parts,
                "tokens": sums.tokens,
                **row_figures(sums, "by_position", kind),
                "mean_value": mean_return + float(sums.error_mean) if sums.tokens else None,
                "mean_return": mean_return if sums.tokens else None,
            }
        )
    return table


def by_label(
    errors: Moments,
    population: Population,
    labels: list[object],
    index: Integers,
    auc: list[float | None],
    kind: Kind,
) -> dict[str, dict[str, Any]]:
    """Metrics of the rollouts with each value of a column.

    Args:
        errors: moments of each rollout's errors.
        population: the rollouts, in the same order.
        labels: the column's values.
        index: int64 [m], each rollout's value among them.
        auc: AUC within prompt groups for each value; empty for a prediction without one.
        kind: of the prediction.
    """
    values = len(labels)
    error, returned = (pool(x, index, values) for x in (errors, population.returns))
    # A column may differ within a prompt group: groups are cut along it.
    cut, part = np.unique(index * population.groups + population.group, return_inverse=True)
    error_within, return_within = (
        sums_by_key(pool(x, part, len(cut)).squares, cut // population.groups, values)
        for x in (errors, population.returns)
    )
    rollouts = np.bincount(index, minlength=values)

    def sums(k: int) -> Sums:
        within = {"error_within": float(error_within[k]), "target_within": float(return_within[k])}
        return Sums.of(
            error, returned, k, **within, discrimination=Discrimination(auc_within_group=auc[k] if auc else None)
        )

    return {
        _key(label): {
            "tokens": int(error.count[k]),
            "rollouts": int(rollouts[k]),
            **row_figures(sums(k), "by", kind),
        }
        for k, label in enumerate(labels)
    }


def by_length(errors: Moments, population: Population, kind: Kind) -> list[dict[str, Any]]:
    """Metrics of the rollouts by response length: up to LENGTH_PARTS bins of equally many rollouts, short to long.

    `from` and `to` are the fewest and the most response tokens in the bin. Rollouts of one length share a bin.

    Args:
        errors: moments of each rollout's errors.
        population: the rollouts, in the same order.
        kind: of the prediction.
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
                **row_figures(Sums.of(error, returned, k), "by_length", kind),
            }
        )
    return table


def best_and_worst_groups(errors: Moments, population: Population) -> dict[str, list[dict[str, Any]]]:
    """The prompt groups with the smallest and the largest mean squared error, GROUPS_SHOWN each, none in both.

    Args:
        errors: moments of each rollout's errors, in the population's order.
        population: the rollouts.

    Returns:
        "best" and "worst" -> rows, the smallest or largest error first. `row` is the number in the data set of the
        group's first rollout; `uid` is None, to be filled in by the caller.
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
