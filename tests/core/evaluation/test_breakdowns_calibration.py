"""Calibration and histograms, recomputed from raw tokens with scikit-learn, numpy and loops."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from critic_train.evaluation.judge import Judge
from critic_train.evaluation.resampling import draws
from critic_train.rollouts import Rollouts

RESAMPLES, SEED = 40, 3


def verdict_of(rollouts, values, parts=1):
    judge = Judge(list(values), resamples=RESAMPLES, seed=SEED)
    for index in np.array_split(np.arange(len(rollouts)), parts):
        tokens = np.isin(np.repeat(np.arange(len(rollouts)), rollouts.lengths), index)
        judge.add(rollouts.take(index), {name: column[tokens] for name, column in values.items()})
    return judge.verdict()


def raw(rollouts, values):
    """Rollout, prompt group, V and G of every response token."""
    mask = rollouts.response_mask
    rollout = np.repeat(np.arange(len(rollouts)), rollouts.lengths)[mask]
    return rollout, rollouts.group[rollout], values[mask].astype(float), rollouts.returns[mask].astype(float)


def bin_of(v):
    """The tenth of the sorted values each value stands in; equal values stand where the last tenth they begin is."""
    ordered = sorted(v.tolist())
    starts = [ordered[k * len(v) // 10] for k in range(1, 10)]
    starts = [x for x in sorted(set(starts)) if x > ordered[0]]
    return np.array([sum(start <= x for start in starts) for x in v.tolist()]), [ordered[0], *starts, ordered[-1]]


@pytest.mark.usefixtures("bootstrap")
@pytest.mark.parametrize(("seed", "parts", "offset"), [(0, 1, 0.0), (1, 9, 0.0), (2, 4, 1e6)])
def test_calibration_equals_a_loop_over_tokens(world, seed, parts, offset):
    rollouts, values = world(seed, offset=offset)
    verdict = verdict_of(rollouts, values, parts)
    for name in ("a", "b"):
        rollout, group, v, g = raw(rollouts, values[name])
        part, edges = bin_of(v)
        table = verdict["critics"][name]["calibration"]
        assert [row["from"] for row in table] == edges[:-1]
        assert [row["to"] for row in table] == edges[1:]
        gap = 0.0
        for k, row in enumerate(table):
            mine = part == k
            assert row["tokens"] == mine.sum()
            assert row["rollouts"] == len(set(rollout[mine].tolist()))
            assert row["mean_value"] == pytest.approx(v[mine].mean(), abs=1e-9)
            assert row["mean_return"] == pytest.approx(g[mine].mean(), abs=1e-9)
            gap += mine.sum() * abs(v[mine].mean() - g[mine].mean())
            keys = np.unique(group)
            drawn = []
            for counts in np.concatenate(list(draws(len(keys), RESAMPLES, SEED))):
                weight = counts[np.searchsorted(keys, group[mine])]
                if weight.sum():
                    drawn.append((weight * g[mine]).sum() / weight.sum())
            assert row["interval"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]).tolist(), abs=1e-8)
        assert verdict["critics"][name]["expected_calibration_error"] == pytest.approx(gap / len(v), abs=1e-9)


def test_calibration_equals_that_of_scikit_learn():
    # 200 tokens, their values all different, returns 0 or 1: tenths of the values are scikit-learn's quantile bins.
    rng = np.random.default_rng(8)
    value, outcome = rng.permutation(200).astype(np.float32) / 250, rng.integers(0, 2, 200)
    rollouts = Rollouts(
        input_ids=np.zeros(400, dtype=np.int32),
        offsets=np.arange(0, 401, 2),
        response_mask=np.tile([False, True], 200),
        returns=np.repeat(outcome, 2).astype(np.float32),
        values=None,
        group=np.arange(200) // 4,
        row=np.arange(200),
    )
    table = verdict_of(rollouts, {"c": np.repeat(value, 2)})["critics"]["c"]["calibration"]
    share, mean = calibration_curve(outcome, value.astype(float), n_bins=10, strategy="quantile")
    assert [row["mean_return"] for row in table] == pytest.approx(share.tolist(), abs=1e-12)
    assert [row["mean_value"] for row in table] == pytest.approx(mean.tolist(), abs=1e-7)


def test_histograms_share_their_edges_and_lose_no_token(world):
    rollouts, values = world(5, rollouts=400)
    values["b"][np.flatnonzero(rollouts.response_mask)[:3]] = [-90, 80, 70]
    verdict = verdict_of(rollouts, values, 5)
    edges = np.array(verdict["return_histogram"]["edges"])
    columns = {"returns": rollouts.returns, "stored": rollouts.values} | values
    raws = {name: column[rollouts.response_mask].astype(float) for name, column in columns.items()}
    tail = len(raws["a"]) // 1000
    assert tail >= 3
    lows = [np.sort(raws[name])[tail] for name in ("stored", "a", "b")] + [raws["returns"].min()]
    highs = [np.sort(raws[name])[-1 - tail] for name in ("stored", "a", "b")] + [raws["returns"].max()]
    assert (edges[0], edges[-1]) == (min(lows), max(highs))
    found = {
        "returns": verdict["return_histogram"],
        "stored": verdict["baselines"]["stored"]["value_histogram"],
        "a": verdict["critics"]["a"]["value_histogram"],
        "b": verdict["critics"]["b"]["value_histogram"],
    }
    for name, histogram in found.items():
        assert histogram["edges"] == edges.tolist()
        assert histogram["counts"] == np.histogram(raws[name], bins=40, range=(edges[0], edges[-1]))[0].tolist()
        assert histogram["below"] == (raws[name] < edges[0]).sum()
        assert histogram["above"] == (raws[name] > edges[-1]).sum()
    assert found["b"]["below"] == found["b"]["above"] == tail


def test_one_value_is_one_bin_and_nothing_is_none(world):
    rollouts, values = world(6, flat=True)
    flat = {"a": np.full_like(values["a"], 0.3)}
    found = verdict_of(rollouts, flat)["critics"]["a"]
    (row,) = found["calibration"]
    assert (row["from"], row["to"], row["rollouts"]) == (row["mean_value"], row["mean_value"], len(rollouts))
    assert sum(found["value_histogram"]["counts"]) == row["tokens"]
    empty = Judge(["c"]).verdict()
    assert empty["return_histogram"] is None
    assert empty["critics"]["c"]["value_histogram"] is None
    assert empty["critics"]["c"]["calibration"] == []
    assert empty["critics"]["c"]["expected_calibration_error"] is None
