"""Figures against Monte-Carlo returns, which a loop sums from the rewards."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from critic_train.evaluation.advantages import AdvantageRecipe
from critic_train.evaluation.judge import Judge
from critic_train.evaluation.resampling import draws
from critic_train.evaluation.summary_text import summary_text

RESAMPLES, SEED = 40, 9


def with_rewards(world, seed, **options):
    """A world with rewards along the response; `stored` and returns have nothing to do with them."""
    rollouts, values = world(seed, **options)
    rng = np.random.default_rng(seed)
    rewards = np.round(rng.normal(0.1, 0.3, len(rollouts.returns)), 1) * rollouts.response_mask
    rewards[~rollouts.response_mask] = np.nan  # what stands off the mask is not read
    return replace(rollouts, rewards=rewards.astype(np.float32)), values


def judged(rollouts, values, parts=1, **recipe):
    judge = Judge(list(values), resamples=RESAMPLES, seed=SEED, advantage=AdvantageRecipe(**recipe))
    for index in np.array_split(np.arange(len(rollouts)), parts):
        tokens = np.isin(np.repeat(np.arange(len(rollouts)), rollouts.lengths), index)
        judge.add(rollouts.take(index), {name: column[tokens] for name, column in values.items()})
    return judge.verdict()


def sums_to_come(rewards, gamma):
    found, after = [], 0.0
    for reward in reversed(rewards.tolist()):
        after = reward + gamma * after
        found.append(after)
    return found[::-1]


@pytest.mark.usefixtures("bootstrap")
@pytest.mark.parametrize(("seed", "parts", "gamma"), [(0, 1, 1.0), (1, 5, 0.9)])
def test_figures_equal_those_against_sums_made_by_hand(world, seed, parts, gamma):
    rollouts, values = with_rewards(world, seed)
    verdict = judged(rollouts, values, parts, gamma=gamma, lam=0.7)
    mask = rollouts.response_mask
    spans = list(itertools.pairwise(rollouts.offsets.tolist()))
    mc = np.concatenate([sums_to_come(rollouts.rewards[a:b][mask[a:b]].astype(float), gamma) for a, b in spans])
    g = rollouts.returns[mask].astype(float)
    group = np.repeat(rollouts.group, rollouts.lengths)[mask]
    keys = np.unique(group)
    rows = verdict["critics"] | {"stored": verdict["baselines"]["stored"]}
    for name, column in (values | {"stored": rollouts.values}).items():
        v = column[mask].astype(float)
        found = rows[name]["monte_carlo"]
        assert found["explained_variance"] == pytest.approx(1 - np.var(mc - v) / np.var(mc), abs=1e-9)
        assert found["mse"] == pytest.approx(((mc - v) ** 2).mean(), abs=1e-9)
        assert found["bias"] == pytest.approx((v - mc).mean(), abs=1e-9)
        inside = [sum(((x[group == k] - x[group == k].mean()) ** 2).sum() for k in keys) for x in (mc - v, mc)]
        assert found["explained_variance_within_group"] == pytest.approx(1 - inside[0] / inside[1], abs=1e-9)
        drawn = []
        for counts in np.concatenate(list(draws(len(keys), RESAMPLES, SEED))):
            pick = np.repeat(np.arange(len(g)), counts[np.searchsorted(keys, group)])
            against = [1 - np.var(x[pick] - v[pick]) / np.var(x[pick]) for x in (g, mc)]
            drawn.append((against[1], against[0] - against[1]))
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
        assert found["explained_variance_interval"] == pytest.approx([low[0], high[0]], abs=1e-9)
        excess = found["explained_variance_excess"]
        assert excess["difference"] == pytest.approx(rows[name]["explained_variance"] - found["explained_variance"])
        assert excess["interval"] == pytest.approx([low[1], high[1]], abs=1e-9)


def test_advantages_are_made_of_the_rewards(world):
    rollouts, values = with_rewards(world, 2, rollouts=60, groups=6)
    mask = rollouts.response_mask
    verdict = judged(rollouts, values, 3)
    own, totals = [], []
    for a, b in itertools.pairwise(rollouts.offsets.tolist()):
        rewards = rollouts.rewards[a:b][mask[a:b]].astype(float)
        own.append(np.array(sums_to_come(rewards, 1.0)) - values["a"][a:b][mask[a:b]])
        totals.append(rewards.sum())
    assert verdict["critics"]["a"]["advantage_variance"] == pytest.approx(np.var(np.concatenate(own)), abs=1e-9)
    theirs = []
    for i, total in enumerate(totals):
        others = [x for j, x in enumerate(totals) if j != i and rollouts.group[j] == rollouts.group[i]]
        theirs.append(np.full(len(own[i]), total - np.mean(others)))
    variance = verdict["baselines"]["group_mean"]["advantage_variance"]
    assert variance == pytest.approx(np.var(np.concatenate(theirs)), abs=1e-9)


def test_only_where_every_batch_has_rewards(world):
    rollouts, values = with_rewards(world, 3)
    assert judged(rollouts, values)["critics"]["a"]["monte_carlo"] is not None
    judge = Judge(["a"], resamples=5)
    for batch in (rollouts, replace(rollouts, rewards=None), rollouts):
        judge.add(batch, {"a": values["a"]})
    verdict = judge.verdict()
    assert verdict["critics"]["a"]["monte_carlo"] is None
    assert verdict["baselines"]["stored"]["monte_carlo"] is None
    assert "monte_carlo" not in verdict["baselines"]["constant"]


def test_a_critic_that_bootstrapped_returns_flatter_is_told(world):
    # Returns a hair from the critic's own values, as those of a small lambda are; the rewards know nothing of them.
    rollouts, values = with_rewards(world, 4, rollouts=80)
    flattering = replace(rollouts, returns=values["a"] + 0.1 * rollouts.returns)
    verdict = judged(flattering, {"a": values["a"]})
    said = [sentence for sentence in summary_text(verdict) if "Monte-Carlo" in sentence]
    assert len(said) == 1
    assert said[0].startswith("against Monte-Carlo returns explained variance is ")
    honest = replace(rollouts, rewards=np.zeros_like(rollouts.returns))
    last = np.array([np.flatnonzero(rollouts.response_mask[:stop])[-1] for stop in rollouts.offsets[1:]])
    honest.rewards[last] = rollouts.returns[last]
    honest = replace(honest, returns=np.repeat(rollouts.returns[last], rollouts.lengths))
    assert not any("Monte-Carlo" in sentence for sentence in summary_text(judged(honest, {"a": values["a"]})))
