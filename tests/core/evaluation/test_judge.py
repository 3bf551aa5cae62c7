"""Every figure of the verdict, recomputed from raw tokens with scikit-learn, scipy, numpy or a plain loop."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from critic_train.evaluation.judge import Judge

EPS = 0.5


def judged(rollouts, values, parts=1, **options):
    judge = Judge(list(values), **{"resamples": 50, **options})
    for index in np.array_split(np.arange(len(rollouts)), parts):
        judge.add(*taken(rollouts, values, index))
    verdict = judge.verdict()
    json.dumps(verdict, allow_nan=False)
    return verdict


def taken(rollouts, values, index):
    tokens = [np.arange(rollouts.offsets[i], rollouts.offsets[i + 1]) for i in index]
    tokens = np.concatenate(tokens) if tokens else np.empty(0, dtype=int)
    return rollouts.take(np.asarray(index, dtype=np.int64)), {n: v[tokens] for n, v in values.items()}


def raw_tokens(rollouts, values):
    """One row a response token: (rollout, place in the response, response length, G, V_old, V), by a loop."""
    rows = []
    for i in range(len(rollouts)):
        span = range(rollouts.offsets[i], rollouts.offsets[i + 1])
        mine = [t for t in span if rollouts.response_mask[t]]
        for k, t in enumerate(mine):
            rows.append((i, k, len(mine), float(rollouts.returns[t]), float(rollouts.values[t]), float(values[t])))
    return rows


def ev(g, v):
    return 1 - np.var(g - v) / np.var(g)


def within(g, v, group):
    above = below = 0.0
    for key in np.unique(group):
        mine = group == key
        error = g[mine] - v[mine]
        above += ((error - error.mean()) ** 2).sum()
        below += ((g[mine] - g[mine].mean()) ** 2).sum()
    return 1 - above / below


@pytest.mark.parametrize(("seed", "parts", "offset"), [(0, 1, 0.0), (1, 7, 0.0), (2, 3, 1e6), (3, 40, -1e6)])
def test_metrics_equal_those_of_the_raw_tokens(world, seed, parts, offset):
    rollouts, values = world(seed, offset=offset)
    verdict = judged(rollouts, values, parts, cliprange_value=EPS)
    for name, v_all in values.items():
        i, _, _, g, old, v = map(np.array, zip(*raw_tokens(rollouts, v_all), strict=True))
        found = verdict["critics"][name]
        clipped = np.array([min(max(x, o - EPS), o + EPS) for x, o in zip(v, old, strict=True)])
        larger = (clipped - g) ** 2 > (v - g) ** 2
        expected = {
            "explained_variance": sklearn.metrics.explained_variance_score(g, v),
            "explained_variance_within_group": within(g, v, rollouts.group[i]),
            "mse": sklearn.metrics.mean_squared_error(g, v),
            "mae": sklearn.metrics.mean_absolute_error(g, v),
            "bias": np.mean(v - g),
            "pearson": scipy.stats.pearsonr(v, g).statistic,
            "spearman": scipy.stats.spearmanr(v, g).statistic,
            "value_loss": 0.5 * np.mean(np.maximum((v - g) ** 2, (clipped - g) ** 2)),
            "clipfrac": np.mean(larger),
            "saturation": np.mean(larger & (np.abs(v - old) > EPS)),
        }
        assert found["clipfrac"] > 0
        for key, figure in expected.items():
            assert found[key] == pytest.approx(figure, rel=1e-9, abs=1e-9), key
        assert verdict["response_tokens"] == len(g)
        assert verdict["rollouts"] == len(rollouts)
        assert verdict["prompt_groups"] == len(set(rollouts.group.tolist()))
        assert verdict["returns"] == {
            "mean": pytest.approx(np.mean(g), rel=1e-12),
            "std": pytest.approx(np.std(g), rel=1e-9),
            "min": min(g),
            "max": max(g),
        }


@pytest.mark.parametrize("positions", [1, 3, 10])
def test_by_position_equals_a_loop_over_tokens(world, positions):
    rollouts, values = world(4)
    table = judged(rollouts, values, 5, positions=positions)["critics"]["a"]["by_position"]
    _, k, n, g, _, v = map(np.array, zip(*raw_tokens(rollouts, values["a"]), strict=True))
    part = np.array([math.floor(positions * int(a) / int(b)) for a, b in zip(k, n, strict=True)])
    assert len(table) == positions
    for index, row in enumerate(table):
        mine = part == index
        assert (row["from"], row["to"]) == (index / positions, (index + 1) / positions)
        assert row["tokens"] == mine.sum()
        assert row["explained_variance"] == pytest.approx(ev(g[mine], v[mine]), abs=1e-9)
        assert row["mse"] == pytest.approx(np.mean((v[mine] - g[mine]) ** 2), abs=1e-9)
        assert row["bias"] == pytest.approx(np.mean(v[mine] - g[mine]), abs=1e-9)
        assert row["mean_value"] == pytest.approx(np.mean(v[mine]), abs=1e-9)
        assert row["mean_return"] == pytest.approx(np.mean(g[mine]), abs=1e-9)


def test_by_column_equals_judging_each_slice(world):
    rollouts, values = world(5, rollouts=60)
    by = judged(rollouts, values, 4, by=["task", "cut", "turns"])["critics"]["a"]["by"]
    assert list(by) == ["task", "cut", "turns"]
    assert list(by["task"]) == ["chat", "sum", "word"]
    assert list(by["cut"]) == ["false", "true"]
    assert list(by["turns"]) == [str(n) for n in sorted(set(rollouts.labels["turns"].tolist()))]
    i, _, _, g, _, v = map(np.array, zip(*raw_tokens(rollouts, values["a"]), strict=True))
    for column, slices in by.items():
        for label, row in slices.items():
            of_rollout = np.array([str(x).lower() == label for x in rollouts.labels[column].tolist()])
            mine = of_rollout[i]
            assert row["tokens"] == mine.sum()
            assert row["rollouts"] == of_rollout.sum()
            assert row["explained_variance"] == pytest.approx(ev(g[mine], v[mine]), abs=1e-9)
            assert row["explained_variance_within_group"] == pytest.approx(
                within(g[mine], v[mine], rollouts.group[i][mine]), abs=1e-9
            )
            assert row["mse"] == pytest.approx(np.mean((v[mine] - g[mine]) ** 2), abs=1e-9)
            assert row["bias"] == pytest.approx(np.mean(v[mine] - g[mine]), abs=1e-9)


@pytest.mark.parametrize("flat", [True, False])
def test_baselines_equal_predictions_made_by_a_loop(world, flat):
    rollouts, values = world(6, rollouts=30, groups=20, flat=flat)
    verdict = judged(rollouts, values, 6)
    rows = raw_tokens(rollouts, values["a"])
    mean_return = {i: np.mean([r[3] for r in rows if r[0] == i]) for i in range(len(rollouts))}
    constant = np.mean([r[3] for r in rows])
    lone, peers_mean = 0, {}
    for i in mean_return:
        peers = [mean_return[j] for j in mean_return if j != i and rollouts.group[j] == rollouts.group[i]]
        lone += not peers
        peers_mean[i] = np.mean(peers) if peers else constant
    i, _, _, g, old, _ = map(np.array, zip(*rows, strict=True))
    predictions = {
        "constant": np.full(len(g), constant),
        "stored": old,
        "group_mean": np.array([peers_mean[int(k)] for k in i]),
    }
    assert list(verdict["baselines"]) == [*predictions, "fused"]
    assert lone > 0
    assert verdict["baselines"]["group_mean"]["lone_rollouts"] == lone
    for name, v in predictions.items():
        found = verdict["baselines"][name]
        clipped = np.minimum(np.maximum(v, old - 0.5), old + 0.5)
        assert found["explained_variance"] == pytest.approx(ev(g, v), abs=1e-9)
        assert found["explained_variance_within_group"] == pytest.approx(within(g, v, rollouts.group[i]), abs=1e-9)
        assert found["mse"] == pytest.approx(np.mean((v - g) ** 2), abs=1e-9)
        assert found["mae"] == pytest.approx(np.mean(np.abs(v - g)), abs=1e-9)
        assert found["bias"] == pytest.approx(np.mean(v - g), abs=1e-9)
        assert found["value_loss"] == pytest.approx(
            0.5 * np.mean(np.maximum((v - g) ** 2, (clipped - g) ** 2)), abs=1e-9
        )
        if name != "constant":
            assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(v, g).statistic, abs=1e-9)
            ranked = scipy.stats.spearmanr(v.astype(np.float32), g).statistic
            assert found["spearman"] == pytest.approx(ranked, abs=1e-9)
    constant_found = verdict["baselines"]["constant"]
    assert constant_found["explained_variance"] == 0.0
    assert constant_found["explained_variance_interval"] == [0.0, 0.0]
    assert constant_found["pearson"] is None
    assert constant_found["spearman"] is None
    assert verdict["baselines"]["stored"]["clipfrac"] == 0.0


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(24)), cuts=st.lists(st.integers(0, 24), max_size=6))
def test_the_verdict_does_not_depend_on_batches_or_order(world, order, cuts):
    rollouts, values = world(7, rollouts=24, groups=5)
    expected = judged(rollouts, values, by=["task"])
    judge = Judge(list(values), by=["task"], resamples=50)
    for part in np.split(np.array(order), sorted(cuts)):
        judge.add(*taken(rollouts, values, part))
    verdict = judge.verdict()
    assert_same(verdict, expected)
    for name in values:  # what training decides by is the same to the last bit
        for key in ("explained_variance", "explained_variance_interval", "mse"):
            assert verdict["critics"][name][key] == expected["critics"][name][key]


def assert_same(found, expected):
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-11, abs=1e-12)
    else:
        assert found == expected
