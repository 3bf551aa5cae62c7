"""Where a figure does not exist, where data are refused, and what a batch may lack."""

import json
from dataclasses import replace

import numpy as np
import pytest

from critic_train.errors import DataError, ModelError
from critic_train.evaluation.judge import Judge
from critic_train.rollouts import Rollouts


def rollouts_of(returns, values=None, group=None, gap=1):
    """One rollout a list of returns, after `gap` prompt tokens."""
    lengths = np.array([gap + len(r) for r in returns])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    pad = [np.nan] * gap  # whatever stands on the prompt is not read
    return Rollouts(
        input_ids=np.zeros(offsets[-1], dtype=np.int32),
        offsets=offsets,
        response_mask=np.concatenate([[False] * gap + [True] * len(r) for r in returns]).astype(bool),
        returns=np.concatenate([pad + list(r) for r in returns]).astype(np.float32),
        values=None if values is None else np.concatenate([pad + list(v) for v in values]).astype(np.float32),
        group=np.array(group if group is not None else range(len(returns)), dtype=np.int64),
        row=np.arange(len(returns)),
    )


def verdict_of(rollouts, value=None, **options):
    judge = Judge(["c"], **options)
    value = np.where(rollouts.response_mask, 0.5, np.nan).astype(np.float32) if value is None else value
    judge.add(rollouts, {"c": value})
    verdict = judge.verdict()
    json.dumps(verdict, allow_nan=False)
    return verdict


def test_one_token():
    verdict = verdict_of(rollouts_of([[0.25]], values=[[2.0]]))
    found = verdict["critics"]["c"]
    for key in ("explained_variance", "explained_variance_within_group", "pearson", "spearman"):
        assert found[key] is None
    assert found["explained_variance_interval"] is None
    assert (found["mse"], found["mae"], found["bias"]) == (0.0625, 0.25, 0.25)
    assert found["value_loss"] == 0.5 * 1.25**2  # clipped up to 1.5
    assert (found["clipfrac"], found["saturation"]) == (1.0, 1.0)
    assert [p["tokens"] for p in found["by_position"]] == [1] + [0] * 9
    assert verdict["baselines"]["group_mean"]["lone_rollouts"] == 1


@pytest.mark.parametrize("level", [0.1, 1e6 / 3, -1e-30])
def test_returns_that_do_not_vary_leave_nothing_to_explain(level):
    verdict = verdict_of(rollouts_of([[level] * 3, [level] * 7, [level]], group=[0, 0, 1]), by=[])
    for metrics in (verdict["critics"]["c"], *verdict["baselines"].values()):
        assert metrics["explained_variance"] is None
        assert metrics["explained_variance_interval"] is None
        assert metrics["explained_variance_within_group"] is None
        assert metrics["pearson"] is None
        assert metrics["spearman"] is None
        assert all(p["explained_variance"] is None for p in metrics["by_position"])
    assert verdict["returns"]["std"] == 0.0
    assert verdict["baselines"]["constant"]["mse"] == 0.0
    assert verdict["baselines"]["group_mean"]["mae"] == 0.0


def test_returns_that_vary_between_prompts_only():
    found = verdict_of(rollouts_of([[0.1] * 3, [0.1] * 2, [0.7] * 4], group=[5, 5, 6]))["critics"]["c"]
    assert found["explained_variance"] == 0.0
    assert found["explained_variance_within_group"] is None
    assert found["explained_variance_within_group_interval"] is None


def test_one_prompt_group_has_no_interval():
    verdict = verdict_of(rollouts_of([[0.0, 0.1], [1.0]], group=[3, 3], values=[[0, 0], [0]]))
    found = verdict["critics"]["c"]
    assert found["explained_variance"] == 0.0
    assert found["explained_variance_interval"] is None
    assert found["explained_variance_within_group_interval"] is None
    assert found["explained_variance_minus"]["stored"]["interval"] is None


def test_constant_predictions_have_no_correlation_but_an_error():
    found = verdict_of(rollouts_of([[0.0, 1.0], [1.0, 0.3]]))["critics"]["c"]
    assert found["explained_variance"] == 0.0
    assert found["explained_variance_interval"] == [0.0, 0.0]
    assert found["pearson"] is None
    assert found["spearman"] is None
    assert found["mse"] == pytest.approx((0.25 * 3 + 0.04) / 4, abs=1e-7)


def test_without_stored_values_there_is_no_clipped_loss():
    verdict = verdict_of(rollouts_of([[0.0, 1.0], [1.0, 0.3]]))
    assert "stored" not in verdict["baselines"]
    assert "stored" not in verdict["critics"]["c"]["explained_variance_minus"]
    for key in ("value_loss", "clipfrac", "saturation"):
        assert verdict["critics"]["c"][key] is None


def test_without_a_clip_the_loss_is_half_the_squared_error():
    rollouts = rollouts_of([[0.0, 1.0], [1.0, 0.3]], values=[[9, 9], [9, 9]])
    found = verdict_of(rollouts, cliprange_value=None)["critics"]["c"]
    assert found["value_loss"] == 0.5 * found["mse"]
    assert found["clipfrac"] is None
    assert found["saturation"] is None


def test_stored_values_count_only_where_every_batch_has_them():
    with_values = rollouts_of([[0.0, 1.0], [1.0, 0.3]], values=[[0, 0], [0, 1]])
    without = replace(with_values, values=None, group=with_values.group + 2, row=with_values.row + 2)
    judge = Judge(["c"])
    for batch in (with_values, without, with_values):
        judge.add(batch, {"c": np.ones(len(batch.returns), dtype=np.float32)})
    verdict = judge.verdict()
    assert list(verdict["baselines"]) == ["constant", "group_mean", "fused"]
    assert verdict["critics"]["c"]["value_loss"] is None
    assert verdict["critics"]["c"]["mse"] == pytest.approx((1 + 0 + 0 + 0.49) / 4, abs=1e-7)


def test_a_critic_may_be_called_stored_and_there_may_be_none():
    rollouts = rollouts_of([[0.0, 1.0], [1.0, 0.3]], values=[[0, 0], [0, 1]])
    judge = Judge(["stored"])
    judge.add(rollouts, {"stored": np.ones(len(rollouts.returns), dtype=np.float32)})
    verdict = judge.verdict()
    assert verdict["critics"]["stored"]["bias"] > verdict["baselines"]["stored"]["bias"]
    judge = Judge([])
    judge.add(rollouts, {})
    assert judge.verdict()["critics"] == {}
    assert judge.verdict()["baselines"]["stored"] == verdict["baselines"]["stored"]


def test_nothing_arrived():
    verdict = Judge(["c"], by=["task"]).verdict()
    json.dumps(verdict, allow_nan=False)
    assert verdict["rollouts"] == verdict["response_tokens"] == verdict["prompt_groups"] == 0
    assert verdict["critics"]["c"]["explained_variance"] is None


def test_rollouts_without_response_tokens_are_left_out():
    rollouts = rollouts_of([[0.0, 1.0], [], [1.0, 0.3]], values=[[0, 0], [], [0, 1]], group=[1, 2, 3])
    assert verdict_of(rollouts) == verdict_of(rollouts.take(np.array([0, 2])))


def test_a_verdict_can_be_asked_for_twice_and_added_to(world):
    rollouts, values = world(8)
    judge = Judge(["a"], resamples=20)
    judge.add(rollouts, {"a": values["a"]})
    assert judge.verdict() == judge.verdict()
    again = replace(rollouts, row=rollouts.row + 1000, group=rollouts.group + 1000)
    judge.add(again, {"a": values["a"]})
    whole = Judge(["a"], resamples=20)
    for batch in (rollouts, again):
        whole.add(batch, {"a": values["a"]})
    assert judge.verdict() == whole.verdict()


def test_values_that_are_not_finite_are_refused_by_place():
    rollouts = rollouts_of([[0.0, 1.0], [1.0, 0.3, 0.2]], values=[[0, 0], [0, 1, np.inf]])
    rollouts = replace(rollouts, row=np.array([41, 42]))
    value = np.zeros(len(rollouts.returns), dtype=np.float32)
    with pytest.raises(DataError, match="values: rollout 42, response token 2: found inf"):
        Judge(["c"]).add(rollouts, {"c": value})
    value[5] = np.nan
    with pytest.raises(ModelError, match=r"critic c: rollout 42, response token 1: found nan.*1 such"):
        Judge(["c"]).add(replace(rollouts, values=None), {"c": value})


def test_wrong_use_is_refused():
    rollouts = rollouts_of([[0.0, 1.0]])
    with pytest.raises(ValueError, match="expected"):
        Judge(["c"]).add(rollouts, {})
    with pytest.raises(ValueError, match="shape"):
        Judge(["c"]).add(rollouts, {"c": np.zeros(2, dtype=np.float32)})
    with pytest.raises(ValueError, match="different names"):
        Judge(["c", "c"])
    with pytest.raises(DataError, match="no column 'task' to judge by"):
        Judge([], by=["task"]).add(rollouts, {})


def test_labels_that_are_missing_or_not_numbers_are_labels_too():
    rollouts = rollouts_of([[0.0, 1.0], [1.0, 0.3], [0.1]])
    labels = {"score": np.array([np.nan, 1.5, np.nan]), "kind": np.array(["x", None, "x"], dtype=object)}
    judge = Judge([], by=["score", "kind"])
    for index in ([0], [1, 2]):
        judge.add(replace(rollouts, labels=labels).take(np.array(index)), {})
    by = judge.verdict()["baselines"]["constant"]["by"]
    assert {k: v["rollouts"] for k, v in by["score"].items()} == {"1.5": 1, "nan": 2}
    assert {k: v["rollouts"] for k, v in by["kind"].items()} == {"None": 1, "x": 2}
