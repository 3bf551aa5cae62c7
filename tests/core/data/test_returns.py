"""What the settings of the Returns panel come to, against figures worked out by hand."""

import numpy as np
import pytest

from critic_train.data.returns import ReturnRecipe
from critic_train.rollouts import Rollouts
from critic_train.settings import ReturnsSettings


def rollouts(truncated=(False, False), lengths=(4, 3)) -> Rollouts:
    """Two rollouts with a prompt of one token; the first has an observation token in second place of its response."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    mask = np.ones(total, dtype=bool)
    mask[offsets[:-1]] = False
    mask[2] = False
    rewards = np.zeros(total, dtype=np.float32)
    rewards[offsets[1:] - 1] = [1.0, 2.0]
    return Rollouts(
        input_ids=np.ones(total, dtype=np.int32),
        offsets=offsets,
        response_mask=mask,
        returns=np.zeros(total, dtype=np.float32),
        values=None,
        group=np.zeros(2, dtype=np.int64),
        row=np.arange(2, dtype=np.int64),
        rewards=rewards,
        truncated=np.asarray(truncated),
    )


# Values of the response tokens: 0.5 and 0.25 in the first rollout, 1.0 and 0.75 in the second.
VALUES = np.asarray([9.0, 0.5, 9.0, 0.25, 9.0, 1.0, 0.75], dtype=np.float32)


def made(settings: ReturnsSettings, batch: Rollouts) -> list[float]:
    return ReturnRecipe.of(settings).returns(batch, VALUES).tolist()


def test_monte_carlo():
    assert made(ReturnsSettings(returns="mc", gamma=0.5), rollouts()) == [0, 0.5, 0, 1.0, 0, 1.0, 2.0]


def test_gae():
    # Second rollout: delta = 0.5 * 0.75 - 1 and 2 - 0.75; A_1 = delta_1 + 0.5 * 0.5 * delta_2.
    second = [1.0 + (0.375 - 1.0) + 0.25 * 1.25, 2.0]
    first = [0.5 + (0.125 - 0.5) + 0.25 * 0.75, 1.0]
    expected = [0, first[0], 0, first[1], 0, *second]
    assert made(ReturnsSettings(returns="gae", gamma=0.5, lam=0.5), rollouts()) == pytest.approx(expected)


def test_a_cut_rollout_goes_on_with_its_last_value_where_asked():
    cut = rollouts(truncated=(True, False))
    plain = ReturnsSettings(returns="mc", gamma=0.5)
    assert made(plain, cut) == made(plain, rollouts())
    bootstrap = ReturnsSettings(returns="mc", gamma=0.5, truncated="bootstrap")
    assert made(bootstrap, cut) == [0, 0.5 * 1.125, 0, 1.0 + 0.5 * 0.25, 0, 1.0, 2.0]
    # lambda 0: one step and the next value; at the cut that is its own.
    one_step = ReturnsSettings(returns="gae", gamma=0.5, lam=0.0, truncated="bootstrap")
    assert made(one_step, cut) == [0, 0.125, 0, 1.125, 0, 0.375, 2.0]


def test_at_lambda_one_values_are_not_needed():
    recipe = ReturnRecipe.of(ReturnsSettings(returns="gae", gamma=0.5))
    assert not recipe.uses_values
    assert recipe.returns(rollouts(), None).tolist() == [0, 0.5, 0, 1.0, 0, 1.0, 2.0]
    assert ReturnRecipe.of(ReturnsSettings(returns="gae", lam=0.9)).uses_values
    assert ReturnRecipe.of(ReturnsSettings(returns="mc", truncated="bootstrap")).uses_values


def test_the_policy_has_a_lambda_of_its_own():
    recipe = ReturnRecipe.of(ReturnsSettings(returns="mc", lam_policy="0"))
    assert recipe.returns(rollouts(), VALUES)[1] == 1.0
    # One step: r + V' - V.
    assert recipe.advantages(rollouts(), VALUES).tolist() == [0, -0.25, 0, 0.75, 0, -0.25, 1.25]


def test_the_policys_lambda_grows_with_the_response():
    """VAPO: 1 - 1/(alpha l), of response tokens alone; 0 where that is negative."""
    settings = ReturnsSettings(returns="gae", lam_policy="auto", length_alpha=0.25)
    batch = rollouts(lengths=(4, 9))
    values = np.zeros(13, dtype=np.float32)
    # l = 2: 1 - 1/0.5 is negative. l = 8: 1 - 1/2; a reward of 2 at the end is worth half as much a token earlier.
    expected = [0, 0, 0, 1, 0, *(2 * 0.5**k for k in range(7, -1, -1))]
    assert ReturnRecipe.of(settings).advantages(batch, values).tolist() == expected
