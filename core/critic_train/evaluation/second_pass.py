"""What needs the tokens a second time: calibration, histograms, AUC, advantages and Monte-Carlo errors.

The first pass gives the range and the quantiles of the values, the outcomes and the prompt groups.
"""

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
    correct_rollouts,
    discrimination,
)
from critic_train.evaluation.breakdowns import CalibrationSums, Histogram
from critic_train.evaluation.moments import Integers, Moments, TokenColumn
from critic_train.evaluation.token_columns import distinct_edges, order_statistics, part_ranks
from critic_train.evaluation.token_sums import Population

CALIBRATION_PARTS = 10
TAIL = 0.001
"""Share of a prediction's tokens on either side that the histograms' edges need not span."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionDetails:
    """What the second pass gives of one prediction.

    Attributes:
        calibration: rows by value.
        discrimination: AUCs.
        value_histogram: None where no token arrived.
        advantages: moments of each rollout's advantages, in order of arrival; None where no token arrived.
        monte_carlo: moments of each rollout's errors against Monte-Carlo returns; None without rewards.
        auc_by: column -> AUC within prompt groups of the rollouts with each of its values.
    """

    calibration: list[dict[str, Any]] = field(default_factory=list)
    discrimination: Discrimination = field(default_factory=Discrimination)
    value_histogram: dict[str, Any] | None = None
    advantages: Moments | None = None
    monte_carlo: Moments | None = None
    auc_by: dict[str, list[float | None]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondPass:
    """What the second pass gives.

    Attributes:
        predictions: name -> its details.
        return_histogram: of the returns; None where no token arrived.
        monte_carlo: moments of each rollout's Monte-Carlo returns, in order of arrival; None without rewards.
    """

    predictions: dict[str, PredictionDetails]
    return_histogram: dict[str, Any] | None = None
    monte_carlo: Moments | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueRange:
    """Where a prediction's values lie.

    Attributes:
        lowest, highest: the extremes.
        low, high: where the tails of TAIL of the tokens end.
        edges: float32, the inner edges of the quantile bins.
    """

    lowest: float
    highest: float
    low: float
    high: float
    edges: TokenColumn


def second_pass(
    accumulated: EvalAccumulator, population: Population, advantage: AdvantageRecipe, *, resamples: int, seed: int
) -> SecondPass:
    """Read the tokens again.

    Args:
        accumulated: what the first pass took in.
        population: of the same.
        advantage: how advantages are estimated.
        resamples: bootstrap resamples of the prompt groups.
        seed: of the draws.
    """
    tokens = int(population.returns.count.sum())
    names = list(accumulated.predictions())
    if not tokens:
        return SecondPass(predictions=dict.fromkeys(names, PredictionDetails()))
    ranges = {name: _value_range(accumulated, name, tokens) for name in names}
    low = min([accumulated.smallest_return, *(r.low for r in ranges.values())])
    high = max([accumulated.largest_return, *(r.high for r in ranges.values())])
    reader = _SecondReader(
        accumulated=accumulated,
        population=population,
        advantage=advantage,
        edges=(low, high),
        correct=correct_rollouts(accumulated.outcomes()),
        resamples=resamples,
        seed=seed,
    )
    predictions = {name: reader.details(name, values) for name, values in ranges.items()}
    returns = Histogram(low, high)
    for column in accumulated.column(RETURNS):
        returns.add(column)
    return SecondPass(
        predictions=predictions, return_histogram=returns.figures(), monte_carlo=reader.monte_carlo_returns()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _SecondReader:
    """Reads the values of one prediction after another."""

    accumulated: EvalAccumulator
    population: Population
    advantage: AdvantageRecipe
    edges: tuple[float, float]
    correct: Bools | None
    resamples: int
    seed: int

    def details(self, name: str, values: ValueRange) -> PredictionDetails:
        group, groups = self.population.arrived_group, self.population.groups
        counts = self.accumulated.returns().count
        has_rewards = self.accumulated.has_rewards
        calibration = CalibrationSums(values.edges, group, groups)
        histogram = Histogram(*self.edges)
        scores = RolloutScores(len(group), self.accumulated.positions)
        advantages = AdvantageMoments(len(group), self.advantage)
        # At lambda 1 an advantage is the Monte-Carlo return less V.
        shortfall = AdvantageMoments(len(group) if has_rewards else 0, self.advantage.at_lambda_1())
        for block in self.accumulated.scan(name):
            calibration.add(block)
            advantages.add(block)
            if block.rewards is not None:
                shortfall.add(block)
            histogram.add(block.values)
            if self.correct is not None or self.population.slices:
                scores.add(block)
        auc = Discrimination()
        if self.correct is not None:
            auc = discrimination(scores, self.correct, group, groups, self.resamples, self.seed)
        return PredictionDetails(
            calibration=calibration.table((values.lowest, values.highest), self.resamples, self.seed),
            discrimination=auc,
            value_histogram=histogram.figures(),
            advantages=advantages.moments(counts),
            monte_carlo=negated(shortfall.moments(counts)) if has_rewards else None,
            auc_by=self._auc_by(scores, group),
        )

    def _auc_by(self, scores: RolloutScores, group: Integers) -> dict[str, list[float | None]]:
        """Column -> AUC within prompt groups for each of its values."""
        outcomes = self.accumulated.outcomes()
        auc_by = {}
        for column, (labels, index) in self.population.slices.items():
            arrived = np.empty_like(index)
            arrived[self.population.order] = index
            auc_by[column] = auc_within_slices(scores.overall, outcomes, group, arrived, len(labels))
        return auc_by

    def monte_carlo_returns(self) -> Moments | None:
        """Moments of each rollout's Monte-Carlo returns: the advantages over a critic that predicts 0."""
        if not self.accumulated.has_rewards:
            return None
        counts = self.accumulated.returns().count
        sums = AdvantageMoments(len(counts), self.advantage.at_lambda_1())
        for block in self.accumulated.scan(RETURNS):
            sums.add(replace(block, values=np.zeros_like(block.values)))
        return sums.moments(counts)


def _value_range(accumulated: EvalAccumulator, name: str, tokens: int) -> ValueRange:
    tail = int(TAIL * tokens)
    ranks = np.concatenate([[0, tail, tokens - 1 - tail, tokens - 1], part_ranks(tokens, CALIBRATION_PARTS)])
    lowest, low, high, highest, *starts = order_statistics(lambda: accumulated.column(name), ranks)
    return ValueRange(
        lowest=float(lowest),
        highest=float(highest),
        low=float(low),
        high=float(high),
        edges=distinct_edges(float(lowest), np.array(starts, dtype=np.float32)),
    )
