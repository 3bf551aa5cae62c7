"""The variance of advantages against GAE and GRPO written as loops over tokens."""

import itertools

import numpy as np
import pytest

from critic_train.evaluation.advantages import AdvantageRecipe
from critic_train.evaluation.judge import Judge
from critic_train.evaluation.resampling import draws

RESAMPLES, SEED = 40, 7


def judged(rollouts, values, parts=1, **recipe):
    judge = Judge(list(values), resamples=RESAMPLES, seed=SEED, advantage=AdvantageRecipe(**recipe))
    for index in np.array_split(np.arange(len(rollouts)), parts):
        tokens = np.isin(np.repeat(np.arange(len(rollouts)), rollouts.lengths), index)
        judge.add(rollouts.take(index), {name: column[tokens] for name, column in values.items()})
    return judge.verdict()


def per_rollout(rollouts, column):
    bounds = itertools.pairwise(rollouts.offsets.tolist())
    return [column[a:b][rollouts.response_mask[a:b]].astype(float) for a, b in bounds]


def gae_by_hand(rewards, values, gamma, lam):
    """Schulman et al. 2016, equation 11 to 16, from the end to the beginning."""
    advantages, following, next_value = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        delta = reward + gamma * next_value - value
        following = delta + gamma * lam * following
        next_value = value
        advantages.append(following)
    return np.array(advantages[::-1])


def terminal(returns):
    """The reward of each token where only the end is rewarded."""
    return [0.0] * (len(returns) - 1) + [returns[-1]]


def grpo_by_hand(totals, group):
    found = []
    for i, total in enumerate(totals):
        others = [x for j, x in enumerate(totals) if j != i and group[j] == group[i]]
        found.append(total - (np.mean(others) if others else np.mean(totals)))
    return found


@pytest.mark.usefixtures("bootstrap")
@pytest.mark.parametrize(
    ("seed", "parts", "recipe"),
    [
        (0, 1, {}),
        (1, 6, {"gamma": 0.97, "lam": 0.9}),
        (2, 3, {"gamma": 1.0, "lam": 0.0}),
        (3, 2, {"length_alpha": 0.2, "lam": 0.5}),
    ],
)
def test_variances_equal_those_of_advantages_made_by_hand(world, seed, parts, recipe):
    rollouts, values = world(seed, rollouts=50, groups=15)
    verdict = judged(rollouts, values, parts, **recipe)
    returns = per_rollout(rollouts, rollouts.returns)
    keys = np.unique(rollouts.group)
    grpo = grpo_by_hand([g[-1] for g in returns], rollouts.group)
    theirs = [np.full(len(g), a) for g, a in zip(returns, grpo, strict=True)]
    group_mean = verdict["baselines"]["group_mean"]
    assert group_mean["lone_rollouts"] > 0
    assert group_mean["advantage_variance"] == pytest.approx(np.var(np.concatenate(theirs)), abs=1e-9)
    critics = verdict["critics"] | {"stored": verdict["baselines"]["stored"]}
    for name, column in (values | {"stored": rollouts.values}).items():
        own = []
        for g, v in zip(returns, per_rollout(rollouts, column), strict=True):
            lam = recipe.get("lam", 1.0)
            if "length_alpha" in recipe:
                lam = max(0.0, 1 - 1 / (recipe["length_alpha"] * len(g)))
            own.append(gae_by_hand(terminal(g), v, recipe.get("gamma", 1.0), lam))
        found = critics[name]
        assert found["advantage_variance"] == pytest.approx(np.var(np.concatenate(own)), abs=1e-9)
        reduction = 1 - np.var(np.concatenate(own)) / np.var(np.concatenate(theirs))
        assert found["variance_reduction"] == pytest.approx(reduction, abs=1e-9)
        drawn = []
        for counts in np.concatenate(list(draws(len(keys), RESAMPLES, SEED))):
            times = counts[np.searchsorted(keys, rollouts.group)]
            pick = [i for i, n in enumerate(times) for _ in range(n)]
            drawn.append(
                1 - np.var(np.concatenate([own[i] for i in pick])) / np.var(np.concatenate([theirs[i] for i in pick]))
            )
        assert found["variance_reduction_interval"] == pytest.approx(
            np.percentile(drawn, [2.5, 97.5]).tolist(), abs=1e-9
        )
    assert "advantage_variance" not in verdict["baselines"]["constant"]
    lam = None if "length_alpha" in recipe else recipe.get("lam", 1.0)
    assert verdict["advantage"] == {"gamma": recipe.get("gamma", 1.0), "lam": lam}


def test_at_lambda_1_it_is_the_unexplained_share_of_both(world):
    # One return a rollout: A = G - V, so the variances are (1 - explained variance) Var(G) each.
    rollouts, values = world(5, flat=True)
    verdict = judged(rollouts, values)
    ours, theirs = verdict["critics"]["a"], verdict["baselines"]["group_mean"]
    expected = 1 - (1 - ours["explained_variance"]) / (1 - theirs["explained_variance"])
    assert theirs["lone_rollouts"] == 0
    assert ours["variance_reduction"] == pytest.approx(expected, abs=1e-9)


def test_without_peers_there_is_no_grpo_to_compare_with(world):
    rollouts, values = world(6)
    alone = rollouts.take(np.arange(len(rollouts)))
    alone.group[:] = np.arange(len(rollouts))
    found = judged(alone, values)["critics"]["a"]
    assert found["advantage_variance"] > 0
    assert (found["variance_reduction"], found["variance_reduction_interval"]) == (None, None)
    empty = Judge(["a"]).verdict()["critics"]["a"]
    assert (empty["advantage_variance"], empty["variance_reduction"]) == (None, None)
