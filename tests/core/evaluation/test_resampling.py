"""The bootstrap against a resampling by hand, and its intervals against a world whose truth is known."""

import numpy as np
import pytest

from critic_train.evaluation import resampling as bootstrap
from critic_train.evaluation.judge import Judge
from critic_train.evaluation.resampling import draws, percentile_interval, resampled_sums
from critic_train.rollouts import Rollouts

RESAMPLES, SEED = 60, 11


def test_draws_are_groups_drawn_with_replacement():
    counts = np.concatenate(list(draws(30, 500, SEED)))
    assert counts.shape == (500, 30)
    assert (counts.sum(axis=1) == 30).all()
    assert counts.mean() == 1.0
    # A group is left out with probability (1 - 1/30)^30 = 0.3617.
    assert np.mean(counts == 0) == pytest.approx(0.3617, abs=0.02)
    assert (np.concatenate(list(draws(30, 500, SEED))) == counts).all()
    assert (np.concatenate(list(draws(30, 500, SEED + 1))) != counts).any()


def test_draws_come_in_small_chunks(monkeypatch):
    whole = np.concatenate(list(draws(30, 500, SEED)))
    monkeypatch.setattr(bootstrap, "CHUNK_NUMBERS", 100)
    parts = list(draws(30, 500, SEED))
    assert {len(p) for p in parts} == {3, 2}
    assert (np.concatenate(parts) == whole).all()
    columns = np.arange(60.0).reshape(30, 2)
    assert resampled_sums(columns, 500, SEED) == pytest.approx(whole @ columns)


def naive_intervals(rollouts, predictions):
    """Concatenate the tokens of the drawn groups, as often as they were drawn, and compute each figure anew."""
    keys = np.unique(rollouts.group)
    mask = rollouts.response_mask
    key = np.repeat(rollouts.group, rollouts.lengths)[mask]
    g = rollouts.returns[mask].astype(float)
    found = {name: [] for name in predictions}
    for counts in np.concatenate(list(draws(len(keys), RESAMPLES, SEED))):
        index = np.concatenate(
            [np.tile(np.flatnonzero(key == k), n) for k, n in zip(keys, counts, strict=True)]
        ).astype(int)
        own = {k: g[key == k].mean() for k in keys}
        inside = np.array([g[t] - own[key[t]] for t in index])
        for name, v in predictions.items():
            e = g - v[mask].astype(float)
            mean_e = {k: e[key == k].mean() for k in keys}
            inside_e = np.array([e[t] - mean_e[key[t]] for t in index])
            overall, within = 1 - np.var(e[index]) / np.var(g[index]), 1 - (inside_e**2).sum() / (inside**2).sum()
            found[name].append((overall, within, (e[index] ** 2).mean()))
    return {name: np.array(figures) for name, figures in found.items()}


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_intervals_equal_a_resampling_by_hand(world, offset):
    rollouts, values = world(21, offset=offset)
    judge = Judge(["a", "b"], resamples=RESAMPLES, seed=SEED)
    judge.add(rollouts, values)
    verdict = judge.verdict()
    by_hand = naive_intervals(rollouts, values | {"stored": rollouts.values})

    def interval(x):
        return pytest.approx(np.percentile(x, [2.5, 97.5]).tolist(), abs=1e-9)

    for name in ("a", "b"):
        found = verdict["critics"][name]
        assert found["explained_variance_interval"] == interval(by_hand[name][:, 0])
        assert found["explained_variance_within_group_interval"] == interval(by_hand[name][:, 1])
        versus = found["explained_variance_minus"]["stored"]
        assert versus["interval"] == interval(by_hand[name][:, 0] - by_hand["stored"][:, 0])
        stored = verdict["baselines"]["stored"]["explained_variance"]
        assert versus["difference"] == found["explained_variance"] - stored
    pair = verdict["differences"]["a - b"]
    apart = by_hand["a"] - by_hand["b"]
    a, b = (verdict["critics"][name] for name in "ab")
    assert pair["interval"] == interval(apart[:, 0])
    for k, key in ((1, "explained_variance_within_group"), (2, "mse")):
        assert pair[key]["interval"] == interval(apart[:, k])
        assert pair[key]["difference"] == a[key] - b[key]


def test_resamples_without_variance_are_left_out():
    assert percentile_interval(np.array([np.nan, 1.0, 3.0, np.nan])) == pytest.approx([1.05, 2.95])
    assert percentile_interval(np.array([np.nan, np.nan])) is None
    # Three groups of constant returns: a ninth of the resamples draw one group thrice and have no variance.
    rollouts = two_level_world(np.array([0.1, 0.7, 0.25]))
    judge = Judge(["c"], resamples=500)
    judge.add(rollouts, {"c": (rollouts.returns * np.float32(0.3)).astype(np.float32)})
    assert judge.verdict()["critics"]["c"]["explained_variance_interval"] == pytest.approx([0.51, 0.51], abs=1e-6)


def two_level_world(levels, peers=1, tokens=3, within=None):
    """`peers` rollouts a group, each of one prompt token and `tokens` response tokens, one return each."""
    rollouts = len(levels) * peers
    lengths = np.full(rollouts, tokens + 1)
    reward = np.repeat(levels, peers) + (0 if within is None else within)
    return Rollouts(
        input_ids=np.zeros(rollouts * (tokens + 1), dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        response_mask=np.tile(np.arange(tokens + 1) > 0, rollouts),
        returns=np.repeat(reward, lengths).astype(np.float32),
        values=None,
        group=np.repeat(np.arange(len(levels)), peers),
        row=np.arange(rollouts),
    )


def test_intervals_cover_the_truth_of_a_known_world():
    # Return = prompt part N(0, 1) + rollout part N(0, 1); V = half of the prompt part + 0.8 of the rollout part.
    # Var(G) = 2, Var(G - V) = 0.25 + 0.04, so the explained variance is 1 - 0.29 / 2.
    # Within groups of n the group's mean takes the prompt part away from both: 1 - 0.04, whatever n.
    rng = np.random.default_rng(5)
    truth, worlds, groups, peers = (1 - 0.29 / 2, 1 - 0.04), 200, 80, 4
    covered = np.zeros(2)
    for seed in range(worlds):
        between, inside = rng.normal(size=groups), rng.normal(size=groups * peers)
        rollouts = two_level_world(between, peers, tokens=1, within=inside)
        value = 0.5 * np.repeat(between, peers) + 0.8 * inside
        # A third part that V adds by mistake, so that the within figure varies from world to world.
        value += rng.normal(0, 0.3, groups * peers)
        judge = Judge(["c"], resamples=300, seed=seed)
        judge.add(rollouts, {"c": np.repeat(value, 2).astype(np.float32)})
        found = judge.verdict()["critics"]["c"]
        noise = 0.09
        expected = (truth[0] - noise / 2, truth[1] - noise)
        for k, key in enumerate(("explained_variance", "explained_variance_within_group")):
            low, high = found[key + "_interval"]
            covered[k] += low <= expected[k] <= high
    assert ((covered / worlds >= 0.90) & (covered / worlds <= 0.99)).all(), covered / worlds
