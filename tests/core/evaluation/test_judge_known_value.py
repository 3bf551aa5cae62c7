"""Against a world whose values are known: calibration, within-prompt figures, and intervals that cover the truth."""

from dataclasses import replace

import numpy as np
import pytest
from hidden_chain import PEERS, make_chain, rollouts_of

from critic_train.evaluation.judge import Judge

CHAIN = make_chain()
DRAWS, GROUPS, RESAMPLES = 200, 100, 200
LARGE = 6_000
LEVELS = {
    "explained_variance": "explained_variance_interval",
    "explained_variance_within_group": "explained_variance_within_group_interval",
    "auc": "auc_interval",
    "auc_within_group": "auc_within_group_interval",
    "variance_reduction": "variance_reduction_interval",
}


def judged(groups, seed, resamples):
    """The true values and the stale ones on one draw of the world."""
    rollouts, true = rollouts_of(CHAIN, groups, seed)
    judge = Judge(["true", "stale"], resamples=resamples, seed=seed)
    judge.add(replace(rollouts, values=None), {"true": true, "stale": rollouts.values})
    return judge.verdict()


@pytest.fixture(scope="module")
def world():
    """So large a draw that its figures are the world's."""
    return judged(LARGE, seed=10**6, resamples=1)


def test_the_values_are_those_of_the_world():
    # The filter against the plainest estimate: of rollouts with the same first tokens, the mean return.
    rollouts, true = rollouts_of(CHAIN, 12_000, seed=5)
    starts = rollouts.offsets[:-1]
    words = rollouts.input_ids[starts[:, None] + np.arange(4)]
    keys, index, count = np.unique(words, axis=0, return_inverse=True, return_counts=True)
    common = np.flatnonzero(count > 500)
    assert len(common) >= 8
    value, outcome = true[starts + 4], rollouts.returns[starts]
    for k in common:
        mine = index == k
        assert np.ptp(value[mine]) < 1e-6
        deviation = np.sqrt(value[mine][0] * (1 - value[mine][0]) / count[k] * PEERS)
        assert outcome[mine].mean() == pytest.approx(value[mine][0], abs=4 * deviation)
    assert len(keys) > len(common)


def test_true_values_are_calibrated_and_stale_ones_show_how_they_were_bent(world):
    true, stale = (world["critics"][name] for name in ("true", "stale"))
    assert true["expected_calibration_error"] < 0.015
    for row in true["calibration"]:
        assert row["mean_value"] == pytest.approx(row["mean_return"], abs=0.03)
    # stale = 0.5 * true + 0.3 + noise: over the bins the gap to the mean return is 0.3 - 0.5 * true on average.
    gap = sum(row["tokens"] * (row["mean_value"] - row["mean_return"]) for row in stale["calibration"])
    mean = world["returns"]["mean"]
    assert gap / world["response_tokens"] == pytest.approx(0.3 - 0.5 * mean, abs=0.01)
    assert stale["expected_calibration_error"] > 0.08
    assert stale["bias"] == pytest.approx(0.3 - 0.5 * mean, abs=0.01)


def test_nothing_explains_more_than_the_true_values_do(world):
    true, stale = (world["critics"][name] for name in ("true", "stale"))
    group_mean = world["baselines"]["group_mean"]
    # E[G | prefix] = V leaves Var(G) - Var(V): the law of total variance.
    rollouts, value = rollouts_of(CHAIN, LARGE, seed=10**6)
    mask = rollouts.response_mask
    share = np.var(value[mask].astype(float)) / np.var(rollouts.returns[mask].astype(float))
    assert true["explained_variance"] == pytest.approx(share, abs=0.01)
    for key in (
        "explained_variance",
        "explained_variance_within_group",
        "auc",
        "auc_within_group",
        "variance_reduction",
    ):
        assert true[key] > stale[key], key
    assert true["explained_variance"] > group_mean["explained_variance"]
    # The first tenth knows little beyond the prompt, and each further one more than the one before.
    along = [row["auc_within_group"] for row in true["auc_by_position"]]
    assert along == sorted(along)
    assert 0.5 < along[0] < 0.6 < 0.75 < along[-1]


def test_the_worth_in_rollouts_is_that_of_the_true_variances():
    """On each prefix R is a coin of bias V, and another rollout of the prompt one of bias V_0."""
    rollouts, true = rollouts_of(CHAIN, 2_000, seed=3)
    mask = rollouts.response_mask
    owner = np.repeat(np.arange(len(rollouts)), rollouts.lengths)[mask]
    first = np.append(True, owner[1:] != owner[:-1])
    v = true[mask].astype(float)
    v0 = v[first][owner]
    noise = np.random.default_rng(0).normal(0, 0.2, 2_000)[np.unique(rollouts.group, return_inverse=True)[1]][owner]
    critics = {"true": v, "stale": rollouts.values[mask].astype(float), "prompt": v0 + noise}
    floor, fall = (v * (1 - v) + (v - v0) ** 2).mean(), (v0 * (1 - v0)).mean()
    judge = Judge(list(critics), resamples=50)
    columns = {name: np.zeros(len(mask), dtype=np.float32) for name in critics}
    for name, column in critics.items():
        columns[name][mask] = column
    judge.add(replace(rollouts, values=None), columns)
    verdict = judge.verdict()
    for name, c in critics.items():
        # Of the variance of R - c on a prefix, less what c is off by on average.
        variance = (v * (1 - v) + (v - c) ** 2).mean() - (v - c).mean() ** 2
        expected = 1 + fall / (variance - floor) if variance > floor else 1024
        found = verdict["critics"][name]
        assert found["worth_in_rollouts"] == pytest.approx(min(expected, 1024), rel=0.10), name
        assert found["worth"]["critic"]["advantage_variance"] == pytest.approx(variance, rel=0.03)
    for row in verdict["critics"]["prompt"]["worth"]["by_rollouts"]:
        k = row["rollouts"]
        assert row["group_mean"]["advantage_variance"] == pytest.approx(floor + fall / (k - 1), rel=0.03)
        # The prompt's value is off by the noise alone: w = k tau^2 / (k tau^2 + s^2).
        left = floor + 0.04 * fall / ((k - 1) * 0.04 + fall)
        assert row["fused"]["advantage_variance"] == pytest.approx(left, rel=0.05)
    start = v0[first]
    share = np.var(start) / (start.mean() * (1 - start.mean()))
    assert verdict["between_prompt_share"] == pytest.approx(share, rel=0.15)


@pytest.mark.slow
def test_intervals_cover_the_truth(world):
    covered = dict.fromkeys([*LEVELS, "difference", "difference within groups", "calibration", "fused", "share"], 0)
    asked = dict.fromkeys(covered, 0)

    def note(name, interval, truth):
        asked[name] += 1
        covered[name] += interval[0] <= truth <= interval[1]

    truth, apart = world["critics"]["true"], world["differences"]["true - stale"]
    for seed in range(DRAWS):
        verdict = judged(GROUPS, seed, RESAMPLES)
        found, pair = verdict["critics"]["true"], verdict["differences"]["true - stale"]
        for name, interval in LEVELS.items():
            note(name, found[interval], truth[name])
        note("difference", pair["interval"], apart["difference"])
        within = "explained_variance_within_group"
        note("difference within groups", pair[within]["interval"], apart[within]["difference"])
        fused = verdict["critics"]["stale"]["fused"]
        note("fused", fused["explained_variance_interval"], world["critics"]["stale"]["fused"]["explained_variance"])
        note("share", verdict["between_prompt_share_interval"], world["between_prompt_share"])
        for row in found["calibration"]:
            note("calibration", row["interval"], row["mean_value"])  # true values: what to expect in the bin
    rates = {name: covered[name] / asked[name] for name in covered}
    assert all(0.90 <= rate <= 0.99 for rate in rates.values()), rates
