"""What needs another pass over the tokens: calibration, histograms, AUC and advantages."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from critic_train.evaluation.accumulate import RETURNS, EvalAccumulator
from critic_train.evaluation.advantages import AdvantageMoments, AdvantageRecipe, negated
from critic_train.evaluation.auc import (
    Bools,
    Discrimination,
    RolloutScores,
    auc_within_slices,
    discrimination,
    right_or_wrong,
)
from critic_train.evaluation.calibration import CalibrationSums, Histogram, expected_calibration_error
from critic_train.evaluation.metrics import Population, Samples
from critic_train.evaluation.moments import Integers, Moments
from critic_train.evaluation.token_columns import TokenColumn, distinct_edges, order_statistics, part_ranks

CALIBRATION_PARTS = 10
TAIL = 0.001
"""Share of a prediction's tokens on either side that the histograms' edges need not span."""


@dataclass(frozen=True, slots=True)
class SecondPass:
    """What was found of one prediction.

    Attributes:
        figures: single ones, by name.
        tables: by name.
        samples: figures in each resample.
        advantages: moments of each rollout's advantages, in order of arrival; None where no token arrived.
        monte_carlo: moments of each rollout's errors against Monte-Carlo returns; None without rewards.
        auc_by: column -> AUC within prompt groups of the rollouts with each of its values.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    samples: Samples = field(default_factory=dict)
    advantages: Moments | None = None
    monte_carlo: Moments | None = None
    auc_by: dict[str, list[float | None]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondPassStats:
    """What was found of every prediction and of the returns.

    Attributes:
        predictions: name -> what was found of it.
        return_histogram: of the returns.
        monte_carlo: moments of each rollout's Monte-Carlo returns, in order of arrival; None without rewards.
    """

    predictions: dict[str, SecondPass]
    return_histogram: dict[str, Any] | None
    monte_carlo: Moments | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spread:
    """Where a prediction's values lie: the extremes, the tails' ends, the inner edges of its quantile bins."""

    lowest: float
    highest: float
    low: float
    high: float
    edges: TokenColumn


def second_pass(
    evidence: EvalAccumulator, population: Population, advantage: AdvantageRecipe, *, resamples: int, seed: int
) -> SecondPassStats:
    """Everything that is found by reading the tokens again.

    Args:
        evidence: what has arrived.
        population: of the same.
        advantage: how advantages are estimated.
        resamples: bootstrap resamples of the prompt groups.
        seed: of the draws.
    """
    tokens = int(population.returns.count.sum())
    names = list(evidence.predictions())
    if not tokens:
        nothing = SecondPass(
            {"expected_calibration_error": None, **Discrimination().figures},
            {"calibration": [], "auc_by_position": [], "value_histogram": None},
        )
        return SecondPassStats(predictions=dict.fromkeys(names, nothing), return_histogram=None)
    spreads = {name: _spread(evidence, name, tokens) for name in names}
    low = min([evidence.smallest_return, *(s.low for s in spreads.values())])
    high = max([evidence.largest_return, *(s.high for s in spreads.values())])
    right = right_or_wrong(evidence.outcomes())
    again = _SecondPassSums(evidence, population, advantage, (low, high), right, resamples, seed)
    found = {name: again.at(name, spread) for name, spread in spreads.items()}
    returned = Histogram(low, high)
    for column in evidence.column(RETURNS):
        returned.add(column)
    return SecondPassStats(predictions=found, return_histogram=returned.figures(), monte_carlo=again.monte_carlo())


@dataclass(frozen=True, slots=True)
class _SecondPassSums:
    """One pass over the values of one prediction after another."""

    evidence: EvalAccumulator
    population: Population
    advantage: AdvantageRecipe
    edges: tuple[float, float]
    right: Bools | None
    resamples: int
    seed: int

    def at(self, name: str, spread: _Spread) -> SecondPass:
        group, groups = self.population.arrived_group, self.population.groups
        counts = self.evidence.returns().count
        calibration = CalibrationSums(spread.edges, group, groups)
        histogram = Histogram(*self.edges)
        scores = RolloutScores(len(group), self.evidence.positions)
        advantages = AdvantageMoments(len(group), self.advantage)
        # At lambda 1 an advantage is the Monte-Carlo return less V.
        shortfall = AdvantageMoments(len(group) if self.evidence.has_rewards else 0, self.advantage.at_lambda_1())
        for block in self.evidence.scan(name):
            calibration.add(block)
            advantages.add(block)
            if block.rewards is not None:
                shortfall.add(block)
            histogram.add(block.values)
            if self.right is not None or self.population.slices:
                scores.add(block)
        table = calibration.table((spread.lowest, spread.highest), self.resamples, self.seed)
        told = Discrimination()
        if self.right is not None:
            told = discrimination(scores, self.right, group, groups, self.resamples, self.seed)
        return SecondPass(
            {"expected_calibration_error": expected_calibration_error(table), **told.figures},
            {"calibration": table, "auc_by_position": told.by_position, "value_histogram": histogram.figures()},
            told.samples,
            advantages.moments(counts),
            negated(shortfall.moments(counts)) if self.evidence.has_rewards else None,
            self._auc_by(scores, group),
        )

    def _auc_by(self, scores: RolloutScores, group: Integers) -> dict[str, list[float | None]]:
        """Column -> a figure for each of its values."""
        outcomes = self.evidence.outcomes()
        found = {}
        for column, (labels, index) in self.population.slices.items():
            arrived = np.empty_like(index)
            arrived[self.population.order] = index
            found[column] = auc_within_slices(scores.whole, outcomes, group, arrived, len(labels))
        return found

    def monte_carlo(self) -> Moments | None:
        """Moments of the Monte-Carlo returns: what they exceed a value of 0 by."""
        if not self.evidence.has_rewards:
            return None
        counts = self.evidence.returns().count
        sums = AdvantageMoments(len(counts), self.advantage.at_lambda_1())
        for block in self.evidence.scan(RETURNS):
            sums.add(replace(block, values=np.zeros_like(block.values)))
        return sums.moments(counts)


def _spread(evidence: EvalAccumulator, name: str, tokens: int) -> _Spread:
    tail = int(TAIL * tokens)
    ranks = np.concatenate([[0, tail, tokens - 1 - tail, tokens - 1], part_ranks(tokens, CALIBRATION_PARTS)])
    lowest, low, high, highest, *starts = order_statistics(lambda: evidence.column(name), ranks)
    return _Spread(
        lowest=float(lowest),
        highest=float(highest),
        low=float(low),
        high=float(high),
        edges=distinct_edges(float(lowest), np.array(starts, dtype=np.float32)),
    )
