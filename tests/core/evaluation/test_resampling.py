"""The bootstrap against a resampling by hand, and its intervals against a world whose truth is known."""

import numpy as np
import pytest
import scipy.stats

from critic_train.evaluation import resampling as bootstrap
from critic_train.evaluation.judge import Judge
from critic_train.evaluation.resampling import Resampling, draws, percentile_interval, student_quantile
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
    monkeypatch.setattr(bootstrap, "FEW_GROUPS", 2)
    resampling = Resampling(groups=30, resamples=500, seed=SEED, effective=30.0)
    assert resampling.sums(columns) == pytest.approx(whole @ columns)


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


@pytest.mark.usefixtures("bootstrap")
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


def test_resamples_without_variance_are_left_out(monkeypatch):
    assert percentile_interval(np.array([np.nan, 1.0, 3.0, np.nan])) == pytest.approx([1.05, 2.95])
    assert percentile_interval(np.array([np.nan, np.nan])) is None
    # Three groups of constant returns: a ninth of the resamples draw one group thrice and have no variance.
    monkeypatch.setattr(bootstrap, "FEW_GROUPS", 2)
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


@pytest.mark.parametrize("freedom", [1.0, 1.3, 2.0, 3.5, 10.0, 24.0])
def test_students_quantile_is_scipys(freedom):
    assert student_quantile(0.975, freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=1e-4)


def test_few_groups_are_left_out_in_turn(world):
    """Student's t about the figure, of ratios on the log scale, by a loop over the groups."""
    rollouts, values = world(21)
    judge = Judge(["a", "b"])
    judge.add(rollouts, values)
    verdict = judge.verdict()
    mask = rollouts.response_mask
    g, key = rollouts.returns[mask].astype(float), np.repeat(rollouts.group, rollouts.lengths)[mask]
    keys = np.unique(key)
    shares = np.array([((g[key == k] - g.mean()) ** 2).sum() for k in keys])
    freedom = max(1.0, (shares.sum() ** 2 / (shares**2).sum() - 1) / 2)
    quantile = scipy.stats.t.ppf(0.975, freedom)

    def figure(v, chosen):
        return 1 - np.var(g[chosen] - v[chosen]) / np.var(g[chosen])

    def student(x, each):
        each = np.array(each)
        error = np.sqrt((len(keys) - 1) / len(keys) * ((each - each.mean()) ** 2).sum())
        return np.array([x - quantile * error, x + quantile * error])

    column = {name: v[mask].astype(float) for name, v in values.items()}
    whole = {name: figure(v, np.ones(len(g), dtype=bool)) for name, v in column.items()}
    left = {name: np.array([figure(v, key != k) for k in keys]) for name, v in column.items()}
    for name in "ab":
        low, high = student(np.log(1 - whole[name]), np.log(1 - left[name]))
        expected = [1 - np.exp(high), 1 - np.exp(low)]
        found = verdict["critics"][name]["explained_variance_interval"]
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
    found = verdict["differences"]["a - b"]["interval"]
    assert found == pytest.approx(student(whole["a"] - whole["b"], left["a"] - left["b"]).tolist(), rel=1e-3)


def test_where_a_few_groups_hold_the_variance_there_is_no_interval():
    judge = Judge(["c"])
    rollouts = two_level_world(np.array([0.0, 0.0, 0.0, 0.0, 5.0]), peers=4, within=np.tile([0.1, -0.1, 0.2, 0], 5))
    judge.add(rollouts, {"c": (rollouts.returns * np.float32(0.5) + np.float32(0.1)).astype(np.float32)})
    found = judge.verdict()["critics"]["c"]
    assert found["explained_variance"] > 0
    assert found["explained_variance_interval"] is None


def drawn_world(kind, rng, groups, peers=8):
    """Returns, a critic's values and another's, [groups, peers]."""
    shape = (groups, peers)
    if kind == "gauss":
        between, inside = rng.normal(size=(groups, 1)), rng.normal(size=shape)
        g = between + inside
        return g, 0.5 * between + 0.8 * inside + rng.normal(0, 0.3, shape), 0.3 * between + rng.normal(0, 0.3, shape)
    chance = rng.beta(*{"even": (0.6, 0.9), "hard": (0.2, 1.5)}[kind], size=(groups, 1))
    g = (rng.random(shape) < chance).astype(float)
    v = 0.6 * chance + 0.2 + 0.1 * rng.normal(size=shape) + 0.1 * g
    return g, v, 0.3 * chance + 0.1 * rng.normal(size=shape)


def judged_world(kind, rng, groups):
    g, *values = drawn_world(kind, rng, groups)
    rollouts = two_level_world(np.zeros(groups), g.shape[1], tokens=1, within=g.ravel())
    judge = Judge(["v", "u"], resamples=10)
    judge.add(rollouts, {n: np.repeat(x.ravel(), 2).astype(np.float32) for n, x in zip("vu", values, strict=True)})
    return judge.verdict()


def intervals_of(verdict):
    found = verdict["critics"]["v"]
    return {
        "explained": (found["explained_variance"], found["explained_variance_interval"]),
        "within": (found["explained_variance_within_group"], found["explained_variance_within_group_interval"]),
        "reduction": (found["variance_reduction"], found["variance_reduction_interval"]),
        "group mean": tuple(found["explained_variance_minus"]["group_mean"].values()),
        "critics": tuple(verdict["differences"]["v - u"][key] for key in ("difference", "interval")),
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("groups", [2, 3, 5, 10])
@pytest.mark.parametrize("kind", ["gauss", "even", "hard"])
def test_intervals_of_few_groups_cover_the_truth_or_are_not_given(kind, groups):
    rng = np.random.default_rng(groups)
    truth = {name: pair[0] for name, pair in intervals_of(judged_world(kind, rng, 10_000)).items()}
    given, covered = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0)
    for _ in range(200):
        for name, (_, interval) in intervals_of(judged_world(kind, rng, groups)).items():
            if interval is not None:
                given[name] += 1
                covered[name] += interval[0] <= truth[name] <= interval[1]
    assert groups > 2 or not any(given.values())
    for name, count in given.items():
        # 90 % of those given, less what so few draws may be off by.
        assert covered[name] >= 0.90 * count - 2 * np.sqrt(0.09 * count), (name, covered, given)
