"""What needs the tokens a second time."""

import numpy as np
from support import branching_rollouts

from critic_train.evaluation.accumulate import EvalAccumulator
from critic_train.evaluation.advantages import AdvantageRecipe
from critic_train.evaluation.resampling import Resampling
from critic_train.evaluation.second_pass import second_pass


def passed(*batches):
    accumulated = EvalAccumulator(["c"], cliprange_value=0.5, by=[], positions=10)
    for rollouts, values in batches:
        accumulated.add(rollouts, {"c": values})
    population = accumulated.population()
    resampling = Resampling(groups=population.groups, resamples=10, seed=0, effective=population.groups)
    return second_pass(accumulated, population, AdvantageRecipe(), resampling)


def test_without_tokens_there_is_nothing():
    result = passed()
    assert result.return_histogram is None
    assert len(result.sums.count) == 0
    assert [details.calibration for details in result.predictions.values()] == [[], []]


def test_every_token_is_in_the_calibration_and_in_the_histograms():
    rollouts = branching_rollouts()
    values = np.linspace(-1, 1, len(rollouts.returns), dtype=np.float32)
    result = passed((rollouts, values))
    tokens = int(rollouts.response_mask.sum())
    details = result.predictions["critic:c"]
    assert sum(row["tokens"] for row in details.calibration) == tokens
    for histogram in (details.value_histogram, result.return_histogram):
        assert sum(histogram["counts"]) + histogram["below"] + histogram["above"] == tokens
        assert histogram["edges"] == result.return_histogram["edges"]
