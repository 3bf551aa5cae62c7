"""By response length and by prompt group, against loops over the tokens."""

from dataclasses import replace

import numpy as np
import pytest

from critic_train.evaluation.judge import Judge


def judged(rollouts, values, **options):
    judge = Judge(list(values), resamples=20, **options)
    judge.add(rollouts, values)
    return judge.verdict()["critics"]["a"]


def raw(rollouts, values):
    mask = rollouts.response_mask
    rollout = np.repeat(np.arange(len(rollouts)), rollouts.lengths)[mask]
    return rollout, values[mask].astype(float), rollouts.returns[mask].astype(float)


@pytest.mark.parametrize("rollouts", [4, 40, 200])
def test_by_length_equals_a_loop_over_rollouts(world, rollouts):
    batch, values = world(1, rollouts=rollouts)
    rollout, v, g = raw(batch, values["a"])
    length = np.bincount(rollout)
    ordered = sorted(length.tolist())
    starts = sorted({ordered[k * rollouts // 5] for k in range(1, 5)} - {ordered[0]})
    part = np.array([sum(start <= n for start in starts) for n in length.tolist()])
    table = judged(batch, values)["by_length"]
    assert len(table) == len(starts) + 1
    for k, row in enumerate(table):
        mine = part[rollout] == k
        assert (row["from"], row["to"]) == (length[part == k].min(), length[part == k].max())
        assert (row["rollouts"], row["tokens"]) == ((part == k).sum(), mine.sum())
        assert row["explained_variance"] == pytest.approx(1 - np.var((g - v)[mine]) / np.var(g[mine]), abs=1e-9)
        assert row["mse"] == pytest.approx(((g - v)[mine] ** 2).mean(), abs=1e-9)
        assert row["bias"] == pytest.approx((v - g)[mine].mean(), abs=1e-9)


def test_best_and_worst_groups_equal_a_loop_and_are_named(world):
    batch, values = world(2, rollouts=90, groups=28)
    rollout, v, g = raw(batch, values["a"])
    group = batch.group[rollout]
    mse = {key: ((v - g)[group == key] ** 2).mean() for key in set(batch.group.tolist())}
    assert len(mse) > 10
    asked = []

    def uids(rows):
        asked.extend(rows)
        return {row: f"prompt of row {row}" for row in rows}

    table = judged(batch, values, uids=uids)["groups"]
    for name, keys in (("best", sorted(mse, key=mse.get)[:5]), ("worst", sorted(mse, key=mse.get)[::-1][:5])):
        assert len(table[name]) == 5
        for row, key in zip(table[name], keys, strict=True):
            mine = group == key
            first = batch.row[batch.group == key].min()
            assert (row["row"], row["uid"]) == (first, f"prompt of row {first}")
            assert (row["rollouts"], row["tokens"]) == ((batch.group == key).sum(), mine.sum())
            assert row["mse"] == pytest.approx(mse[key], abs=1e-9)
            assert row["mean_value"] == pytest.approx(v[mine].mean(), abs=1e-9)
            assert row["mean_return"] == pytest.approx(g[mine].mean(), abs=1e-9)
    assert len(asked) == len(set(asked)) <= 20  # of the critic and of the stored values, in one look-up


def test_no_group_is_among_the_best_and_the_worst(world):
    batch, values = world(3, rollouts=12, groups=4)
    few = replace(batch, group=np.arange(12) // 4)
    table = judged(few, values)["groups"]
    rows = [row["row"] for name in ("best", "worst") for row in table[name]]
    assert (len(table["best"]), len(table["worst"])) == (2, 1)
    assert len(set(rows)) == 3
    assert table["best"][0]["uid"] is None
