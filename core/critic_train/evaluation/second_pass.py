"""What needs the tokens a second time: calibration, histograms, AUC, advantages and Monte-Carlo errors.

The first pass gives the range and the quantiles of the values, the outcomes and the prompt groups.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from critic_train.evaluation.accumulate import RETURNS, EvalAccumulator
from critic_train.evaluation.advantages import AdvantageMoments, AdvantageRecipe, negated, same_for_all_tokens
from critic_train.evaluation.auc import (
    Bools,
    Discrimination,
    RolloutScores,
    auc_within_slices,
    correct_rollouts,
    discrimination,
)
from critic_train.evaluation.breakdowns import CalibrationSums, Histogram
from critic_train.evaluation.moments import Floats, Integers, Moments, TokenColumn, segment_moments
from critic_train.evaluation.resampling import Resampling
from critic_train.evaluation.token_columns import distinct_edges, order_statistics, part_ranks
from critic_train.evaluation.token_sums import Block, Population

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
        first_value: float64 [m], the value of each rollout's first response token.
        values: moments of each rollout's values.
        apart: moments of each rollout's Monte-Carlo returns less its values.
        monte_carlo: moments of each rollout's errors against Monte-Carlo returns; None without rewards.
        auc_by: column -> AUC within prompt groups of the rollouts with each of its values.
    """

    calibration: list[dict[str, Any]] = field(default_factory=list)
    discrimination: Discrimination = field(default_factory=Discrimination)
    value_histogram: dict[str, Any] | None = None
    advantages: Moments | None = None
    first_value: Floats = field(default_factory=lambda: np.empty(0))
    values: Moments = field(default_factory=lambda: Moments.empty(0))
    apart: Moments = field(default_factory=lambda: Moments.empty(0))
    monte_carlo: Moments | None = None
    auc_by: dict[str, list[float | None]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondPass:
    """What the second pass gives.

    Attributes:
        predictions: name -> its details.
        return_histogram: of the returns; None where no token arrived.
        sums: moments of each rollout's Monte-Carlo returns, the sums of the rewards to come, in order of arrival;
            without rewards those of its outcome, given at its end.
    """

    predictions: dict[str, PredictionDetails]
    return_histogram: dict[str, Any] | None = None
    sums: Moments = field(default_factory=lambda: Moments.empty(0))


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
    accumulated: EvalAccumulator, population: Population, advantage: AdvantageRecipe, resampling: Resampling
) -> SecondPass:
    """Read the tokens again.

    Args:
        accumulated: what the first pass took in.
        population: of the same.
        advantage: how advantages are estimated.
        resampling: of the prompt groups.
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
        resampling=resampling,
    )
    sums = reader.sums_to_come()
    predictions = {name: reader.details(name, values, sums) for name, values in ranges.items()}
    returns = Histogram(low, high)
    for column in accumulated.column(RETURNS):
        returns.add(column)
    return SecondPass(predictions=predictions, return_histogram=returns.figures(), sums=sums)


@dataclass(frozen=True, slots=True, kw_only=True)
class _SecondReader:
    """Reads the values of one prediction after another."""

    accumulated: EvalAccumulator
    population: Population
    advantage: AdvantageRecipe
    edges: tuple[float, float]
    correct: Bools | None
    resampling: Resampling

    def details(self, name: str, values: ValueRange, sums: Moments) -> PredictionDetails:
        """What one prediction's values give; `sums` are the moments of the Monte-Carlo returns."""
        group, groups = self.population.arrived_group, self.population.groups
        counts, has_rewards = sums.count, self.accumulated.has_rewards
        calibration = CalibrationSums(values.edges, group, groups)
        histogram = Histogram(*self.edges)
        scores = RolloutScores(len(group), self.accumulated.positions)
        own = ValueMoments(len(group))
        # At lambda 1 an advantage is the Monte-Carlo return less V; where that is one number a rollout, no recursion is
        # needed.
        constant, bootstraps = self._one_sum_a_rollout, self.advantage.bootstraps
        advantages = AdvantageMoments(len(group) if bootstraps or not constant else 0, self.advantage)
        apart = AdvantageMoments(len(group) if bootstraps and not constant else 0, self.advantage.at_lambda_1())
        for block in self.accumulated.scan(name):
            calibration.add(block)
            own.add(block)
            for moments in (advantages, apart):
                if moments.rollouts:
                    moments.add(block)
            histogram.add(block.values)
            if self.correct is not None or self.population.slices:
                scores.add(block)
        auc = Discrimination()
        if self.correct is not None:
            auc = discrimination(scores, self.correct, group, self.resampling)
        moments_of_values = own.moments(counts)
        to_come = apart if bootstraps else advantages
        less_values = (
            Moments(counts, sums.mean - moments_of_values.mean, moments_of_values.squares)
            if constant
            else to_come.moments(counts)
        )
        return PredictionDetails(
            calibration=calibration.table((values.lowest, values.highest), self.resampling),
            discrimination=auc,
            value_histogram=histogram.figures(),
            advantages=advantages.moments(counts) if advantages.rollouts else less_values,
            first_value=own.first,
            values=moments_of_values,
            apart=less_values,
            monte_carlo=negated(less_values) if has_rewards else None,
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

    @property
    def _one_sum_a_rollout(self) -> bool:
        """Whether the rewards to come are the same at every token: without rewards and a discount."""
        return not self.accumulated.has_rewards and self.advantage.gamma == 1.0

    def sums_to_come(self) -> Moments:
        """Moments of each rollout's Monte-Carlo returns: the advantages over a critic that predicts 0."""
        counts = self.accumulated.returns().count
        if self._one_sum_a_rollout:
            return same_for_all_tokens(self.accumulated.outcomes(), counts)
        sums = AdvantageMoments(len(counts), self.advantage.at_lambda_1())
        for block in self.accumulated.scan(RETURNS):
            sums.add(replace(block, values=np.zeros_like(block.values)))
        return sums.moments(counts)


class ValueMoments:
    """The first value of each rollout, and the moments of all of them."""

    def __init__(self, rollouts: int) -> None:
        self.first, self._means, self._squares = np.zeros((3, rollouts))

    def add(self, block: Block) -> None:
        """Take in a block."""
        moments = segment_moments(block.values.astype(np.float64), block.starts, block.lengths, block.owner)
        self.first[block.rollouts] = block.values[block.starts]
        self._means[block.rollouts], self._squares[block.rollouts] = moments.mean, moments.squares

    def moments(self, counts: Integers) -> Moments:
        """Moments of each rollout, in order of arrival; `counts` are their response tokens."""
        return Moments(counts, self._means, self._squares)


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
