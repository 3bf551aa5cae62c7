"""What an evaluation takes in."""

from dataclasses import replace

import numpy as np
import pytest
from support import branching_rollouts

from critic_train.errors import DataError, ModelError
from critic_train.evaluation.accumulate import CRITIC, STORED, EvalAccumulator


def accumulator():
    return EvalAccumulator(["c"], cliprange_value=0.5, by=[], positions=10)


def test_stored_values_are_judged_only_where_every_batch_has_them():
    rollouts = branching_rollouts()
    accumulated = accumulator()
    accumulated.add(rollouts, {"c": rollouts.returns})
    assert list(accumulated.predictions()) == [STORED, CRITIC + "c"]
    accumulated.add(replace(rollouts, values=None), {"c": rollouts.returns})
    assert list(accumulated.predictions()) == [CRITIC + "c"]


def test_an_outcome_is_the_sum_of_rewards_else_the_last_return():
    rollouts = branching_rollouts()
    without, with_rewards = accumulator(), accumulator()
    without.add(rollouts, {"c": rollouts.returns})
    last = [
        rollouts.returns[start:stop][rollouts.response_mask[start:stop]][-1]
        for start, stop in zip(rollouts.offsets[:-1], rollouts.offsets[1:], strict=True)
    ]
    assert without.outcomes() == pytest.approx(last)
    rewarded = replace(rollouts, rewards=np.where(rollouts.response_mask, 0.5, 9.0).astype(np.float32))
    with_rewards.add(rewarded, {"c": rollouts.returns})
    assert with_rewards.outcomes() == pytest.approx(0.5 * rollouts.response_counts)


def test_what_is_not_finite_is_named():
    rollouts = branching_rollouts()
    values = rollouts.returns.copy()
    values[np.flatnonzero(rollouts.response_mask)[0]] = np.nan
    with pytest.raises(ModelError, match="critic c: rollout 0, response token 0: found nan"):
        accumulator().add(rollouts, {"c": values})
    with pytest.raises(DataError, match="returns: rollout 0, response token 0: found nan"):
        accumulator().add(replace(rollouts, returns=values), {"c": rollouts.returns})
