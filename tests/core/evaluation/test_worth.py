"""What a critic is worth in rollouts: against every subset of a prompt's rollouts, one by one."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from critic_train.evaluation.advantages import AdvantageRecipe
from critic_train.evaluation.fused_verdict import fused_predictions
from critic_train.evaluation.judge import Judge
from critic_train.evaluation.moments import Moments
from critic_train.evaluation.resampling import Resampling
from critic_train.evaluation.second_pass import second_pass
from critic_train.evaluation.worth import (
    MOST,
    Worth,
    WorthOutcomes,
    between_prompt_share,
    rollouts_of,
    share_columns,
    variance_of_others,
)
from critic_train.rollouts import Rollouts

SIZES = [5, 4, 1, 5, 3, 2]


def made(sizes, seed=0):
    """Rollouts of these prompts with a return each, and the values of a critic that watches them."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(len(sizes)), sizes)
    lengths = rng.integers(2, 7, len(group))
    outcome = (rng.random(len(group)) < rng.beta(1, 1, len(sizes))[group]).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = int(offsets[-1])
    mask = np.ones(tokens, dtype=bool)
    mask[offsets[:-1]] = False
    start = rng.normal(0.4, 0.2, len(sizes))[group]
    share = (np.arange(tokens) - np.repeat(offsets[:-1], lengths) - 1) / np.repeat(lengths, lengths)
    values = np.repeat(start, lengths) + share * (np.repeat(outcome, lengths) - 0.5) * 0.4
    rollouts = Rollouts(
        input_ids=np.zeros(tokens, dtype=np.int32),
        offsets=offsets,
        response_mask=mask,
        returns=np.repeat(outcome, lengths),
        values=None,
        group=group,
        row=np.arange(len(group)),
    )
    return rollouts, values.astype(np.float32)


def per_rollout(rollouts, column):
    spans = pairwise(rollouts.offsets.tolist())
    return [column[a:b][rollouts.response_mask[a:b]].astype(float) for a, b in spans]


def variance_over_subsets(errors_of, sizes, k, group):
    """Mean over subsets of the squared advantages, less the squared mean: prompts with one rollout left out.

    Args:
        errors_of: (rollout, subset of the others of its prompt) -> its advantages.
        sizes: of the prompts.
        k: rollouts of a prompt that are taken.
        group: prompt of each rollout.
    """
    tokens = first = second = 0.0
    for i, prompt in enumerate(group):
        if sizes[prompt] < 2:
            continue
        others = [j for j in range(len(group)) if group[j] == prompt and j != i]
        each = [errors_of(i, subset) for subset in combinations(others, k - 1)]
        tokens += len(each[0])
        first += np.mean([x.sum() for x in each])
        second += np.mean([(x**2).sum() for x in each])
    return second / tokens - (first / tokens) ** 2


def test_the_variance_of_the_others_is_numpys():
    rollouts, _ = made(SIZES)
    x = np.random.default_rng(1).normal(size=len(rollouts)) + 1e6
    found = variance_of_others(x, rollouts.group, np.array(SIZES))
    for i, prompt in enumerate(rollouts.group):
        others = [x[j] for j in range(len(rollouts)) if rollouts.group[j] == prompt and j != i]
        if len(others) > 1:
            assert found[i] == pytest.approx(np.var(others, ddof=1), rel=1e-4)
        elif others:
            assert found[i] == pytest.approx(np.var(x[rollouts.group == prompt], ddof=1), rel=1e-4)
        else:
            assert found[i] == 0.0


def test_it_is_the_mean_over_every_subset():
    sizes = [5] * 6 + [1]
    rollouts, values = made(sizes)
    judge = Judge(["c"], resamples=20)
    judge.add(rollouts, {"c": values})
    worth = judge.verdict()["critics"]["c"]["worth"]
    assert worth["rollouts_a_prompt"] == 5
    assert [row["rollouts"] for row in worth["by_rollouts"]] == [2, 3, 4, 5]
    outcome = np.array([g[-1] for g in per_rollout(rollouts, rollouts.returns)])
    v, group = per_rollout(rollouts, values), rollouts.group
    accumulated = judge._accumulated
    population = accumulated.population()
    resampling = Resampling(groups=7, resamples=5, seed=0, effective=7.0)
    passed = second_pass(accumulated, population, AdvantageRecipe(), resampling)
    [fused] = fused_predictions(accumulated, population, passed).values()
    for row in worth["by_rollouts"]:
        k = row["rollouts"]

        def grpo(i, subset):
            return np.full(len(v[i]), outcome[i] - np.mean([outcome[j] for j in subset]))

        def mixed(i, subset, k=k):
            w, scale = (x[group[i]] for x in fused.weights.at(k - 1))
            residual = np.mean([outcome[j] - v[j][0] for j in subset])
            return outcome[i] - (v[i][0] + scale * (v[i] - v[i][0]) + w * residual)

        expected = variance_over_subsets(grpo, sizes, k, group)
        assert row["group_mean"]["advantage_variance"] == pytest.approx(expected, abs=1e-7)
        expected = variance_over_subsets(mixed, sizes, k, group)
        assert row["fused"]["advantage_variance"] == pytest.approx(expected, abs=1e-7)
    several = [i for i in range(len(group)) if sizes[group[i]] > 1]
    alone = np.var(np.concatenate([outcome[i] - v[i] for i in several]))
    assert worth["critic"]["advantage_variance"] == pytest.approx(alone, abs=1e-7)
    own = np.var(np.concatenate([np.full(len(v[i]), outcome[i]) for i in several]))
    assert worth["critic"]["explained_variance"] == pytest.approx(1 - alone / own, abs=1e-7)


def test_it_is_what_the_verdict_says_of_whole_groups():
    rollouts, values = made([6] * 30, 3)
    judge = Judge(["c"], resamples=20)
    judge.add(rollouts, {"c": values})
    verdict = judge.verdict()
    last = verdict["critics"]["c"]["worth"]["by_rollouts"][-1]
    assert last["rollouts"] == 6
    for name in ("group_mean", "fused"):
        whole = verdict["baselines"][name]["advantage_variance"]
        assert last[name]["advantage_variance"] == pytest.approx(whole, abs=1e-9)


def test_n_is_where_the_groups_mean_does_as_well():
    # Var = a + b / (N - 1): with a = 0.2 and b = 0.12 a group of 4 leaves 0.24.
    sums = {"own": np.array([0.3, 0.3]), "floor": np.array([0.2, 0.2]), "fall": np.array([0.12, 0.12])}
    resampling = Resampling(groups=400, resamples=1, seed=0, effective=400.0)

    def worth(variance):
        return Worth(
            sizes=[2, 4], critic=np.array([variance] * 2), fused=[np.ones(2)] * 2, resampling=resampling, **sums
        )

    for variance, rollouts in ((0.24, 4.0), (0.32, 2.0), (0.19, MOST), (0.2, MOST), (0.2001, MOST)):
        found = rollouts_of(float(worth(variance).inverse(np.array([variance]))[0]))
        assert found == pytest.approx(rollouts)
    assert worth(0.24).group_mean(4) == pytest.approx([0.24, 0.24])
    figures = worth(0.24).figures()
    assert (figures["rollouts_a_prompt"], figures["rollouts_with_fused"]) == (4, 1)
    assert rollouts_of(float("nan")) is None
    assert rollouts_of(float("inf")) == 1.0


def test_the_share_between_prompts_is_that_of_an_analysis_of_variance():
    rollouts, _ = made(SIZES, 2)
    rng = np.random.default_rng(0)
    outcome, size = rng.normal(size=len(rollouts)) + np.array([3, 0, 1, -2, 1, 0])[rollouts.group], np.array(SIZES)
    groups = [outcome[rollouts.group == g] for g in range(len(SIZES))]
    n, total = size.sum(), len(SIZES)
    within = sum(((x - x.mean()) ** 2).sum() for x in groups) / (n - total)
    between = sum(len(x) * (x.mean() - outcome.mean()) ** 2 for x in groups) / (total - 1)
    tau2 = (between - within) / ((n - (size**2).sum() / n) / (total - 1))
    columns = share_columns(outcome, rollouts.group, size)
    assert between_prompt_share(columns.sum(axis=0, keepdims=True))[0] == pytest.approx(tau2 / (tau2 + within))
    alone = share_columns(outcome, np.arange(n), np.ones(n, dtype=int))
    assert np.isnan(between_prompt_share(alone.sum(axis=0, keepdims=True))[0])


def test_without_a_second_rollout_there_is_no_worth():
    rollouts, values = made([1] * 8)
    judge = Judge(["c"], resamples=5)
    judge.add(rollouts, {"c": values})
    verdict = judge.verdict()
    found = verdict["critics"]["c"]
    assert found["worth_in_rollouts"] is None
    assert (found["worth"]["rollouts_a_prompt"], found["worth"]["by_rollouts"]) == (None, [])
    assert verdict["baselines"]["group_mean"]["mse"] is None
    assert verdict["baselines"]["fused"]["mse"] is None
    assert verdict["between_prompt_share"] is None


def test_outcomes_of_several_sizes_are_tabulated_up_to_the_median():
    size = np.array([1, 4, 12, 12, 30])
    group = np.repeat(np.arange(5), size)
    sums = Moments(np.ones(len(group), dtype=int), np.zeros(len(group)), np.zeros(len(group)))
    worth = WorthOutcomes(group=group, size=size, sums=sums, outcomes=np.zeros(len(group)))
    assert worth.sizes == [2, 3, 4, 6, 8, 12]
