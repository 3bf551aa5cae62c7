"""Calibration and histograms: how predicted values and returns are spread, token by token."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from critic_train.evaluation.moments import Floats, Integers
from critic_train.evaluation.resampling import percentile_interval, resampled_sums
from critic_train.evaluation.token_columns import TokenColumn

HISTOGRAM_BINS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some whole rollouts and one prediction's values of them.

    Attributes:
        rollouts: which of all rollouts, in order of arrival.
        owner: int64 [T], the rollout of each response token, counted within the block.
        starts: int64 [rollouts], the first token of each.
        lengths: int64 [rollouts], their response tokens, at least 1 each.
        values: float32 [T].
        returns: float32 [T].
        rewards: float32 [T]; None where not every batch had them.
    """

    rollouts: slice
    owner: Integers
    starts: Integers
    lengths: Integers
    values: TokenColumn
    returns: TokenColumn
    rewards: TokenColumn | None


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
        for place, weights in enumerate((None, block.values, block.returns)):
            found = np.bincount(cell, weights=weights, minlength=rollouts * self._bins).reshape(rollouts, self._bins)
            np.add.at(self._sums[place], self._group[block.rollouts], found)
            if weights is None:
                self._rollouts += np.count_nonzero(found, axis=0)

    def table(self, bounds: tuple[float, float], resamples: int, seed: int) -> list[dict[str, Any]]:
        """A row for each bin, rising.

        Args:
            bounds: the smallest and the largest value.
            resamples: bootstrap resamples of the prompt groups.
            seed: of the draws.
        """
        tokens, value, returned = (part.sum(axis=0) for part in self._sums)
        mean_return = returned / np.maximum(tokens, 1)
        intervals: list[list[float] | None] = [None] * self._bins
        groups = self._sums.shape[1]
        if groups >= 2:
            # Distances from the mean, so that the sums of a resample do not cancel.
            distance = self._sums[2] - self._sums[0] * mean_return
            sums = resampled_sums(np.concatenate([self._sums[0], distance], axis=1), resamples, seed)
            drawn, apart = sums[:, : self._bins], sums[:, self._bins :]
            with np.errstate(invalid="ignore"):
                intervals = [percentile_interval(column) for column in (mean_return + apart / drawn).T]
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


def expected_calibration_error(table: list[dict[str, Any]]) -> float | None:
    """Mean distance between predicted value and mean return over the bins, weighted by tokens.

    Naeini et al. 2015, with bins of equal mass (Nguyen and O'Connor 2015): equal widths leave most bins of a critic
    empty.

    Args:
        table: from `CalibrationSums.table`.
    """
    tokens = sum(row["tokens"] for row in table)
    if not tokens:
        return None
    return float(sum(row["tokens"] * abs(row["mean_value"] - row["mean_return"]) for row in table) / tokens)


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
