"""Returns made by a recursion written out here, and found again."""

from dataclasses import replace

import numpy as np
import pytest
from support import readable_rollouts

from critic_train.check.check import match_returns
from critic_train.rollouts import Rollouts


def made(gamma: float, lam: float, *, bootstrap: bool = False, seed: int = 0) -> Rollouts:
    """Rollouts with gaps in their masks, rewards on some tokens, and the lambda-returns of these."""
    rollouts = readable_rollouts(60, seed=seed)
    draw = np.random.default_rng(seed)
    size = len(rollouts.input_ids)
    mask = rollouts.response_mask & ((draw.random(size) > 0.1) | np.isin(np.arange(size), rollouts.offsets[1:] - 1))
    rewards = np.where(mask & (draw.random(size) < 0.2), draw.normal(size=size), 0.0).astype(np.float32)
    values = draw.normal(size=size).astype(np.float32)
    cut = draw.random(len(rollouts)) < 0.5
    returns = np.zeros(size)
    for i in range(len(rollouts)):
        steps = [t for t in range(rollouts.offsets[i], rollouts.offsets[i + 1]) if mask[t]]
        following, advantage = float(values[steps[-1]]) if bootstrap and cut[i] else 0.0, 0.0
        for t in reversed(steps):
            advantage = rewards[t] + gamma * following - values[t] + gamma * lam * advantage
            returns[t] = advantage + values[t]
            following = float(values[t])
    columns = {"response_mask": mask, "rewards": rewards, "values": values, "returns": returns.astype(np.float32)}
    return replace(rollouts, **columns, truncated=cut if bootstrap else None)


@pytest.mark.parametrize(
    ("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (1.0, 0.95), (0.95, 1.0), (0.998, 0.93), (0.9, 0.0)]
)
def test_the_pair_is_found(gamma, lam):
    match = match_returns(made(gamma, lam))
    assert match is not None
    assert match.matches
    assert (match.gamma, match.lam) == pytest.approx((gamma, lam), abs=2e-4)


def test_a_bootstrap_behind_cut_rollouts_is_seen():
    match = match_returns(made(0.99, 0.95, bootstrap=True))
    assert match is not None
    assert (match.matches, match.bootstrapped, match.gamma, match.lam) == (True, True, 0.99, 0.95)


def test_noise_matches_nothing():
    rollouts = made(1.0, 1.0)
    noise = np.random.default_rng(1).normal(size=len(rollouts.returns)).astype(np.float32)
    match = match_returns(replace(rollouts, returns=noise))
    assert match is not None
    assert not match.matches


def test_a_little_noise_on_top_is_no_match_either():
    rollouts = made(0.99, 0.95)
    noise = 0.02 * np.random.default_rng(1).normal(size=len(rollouts.returns)).astype(np.float32)
    match = match_returns(replace(rollouts, returns=rollouts.returns + noise))
    assert match is not None
    assert not match.matches
    assert (match.gamma, match.lam) == pytest.approx((0.99, 0.95), abs=0.02), "the closest is still told"


def test_half_precision_passes():
    rollouts = made(0.99, 0.95)
    halved = rollouts.returns.astype(np.float16).astype(np.float32)
    match = match_returns(replace(rollouts, returns=halved))
    assert match is not None
    assert (match.matches, match.gamma, match.lam) == (True, 0.99, 0.95)


def test_without_values_only_monte_carlo_can_be_told():
    match = match_returns(replace(made(0.99, 1.0), values=None))
    assert match is not None
    assert (match.matches, match.gamma, match.lam) == (True, 0.99, 1.0)


def test_without_rewards_there_is_nothing_to_match():
    assert match_returns(replace(made(1.0, 1.0), rewards=None)) is None
