"""Gates: what they are called, when they fail, and what is said then."""

import pytest
from support import branching_rollouts, write_shard

from critic_train.errors import ConfigError
from critic_train.evaluation.evaluate import evaluate, judge_gates
from critic_train.events import Progress, RunEnded
from critic_train.settings import EvalSettings
from critic_train.stopping import StopRequest

RESULT = {
    "explained_variance": 0.25,
    "explained_variance_interval": [0.2, 0.3],
    "spearman": None,
    "auc_interval": None,
    "rollouts": 8,
    "critics": {"runs/v1.2=x": {"mse": 0.5}},
    "differences": {"a - b": {"difference": 0.1, "interval": [-0.1, 0.3]}},
    "words": ["yes"],
}


@pytest.mark.parametrize(
    ("pair", "found", "reason"),
    [
        ("explained_variance=0.25", 0.25, None),
        ("explained_variance=0.2500001", 0.25, "explained_variance is 0.25, below 0.25"),
        ("explained_variance_interval.low=0.1", 0.2, None),
        ("explained_variance_interval.high=0.4", 0.3, "explained_variance_interval.high is 0.3, below 0.4"),
        ("differences.a - b.interval.low=0", -0.1, "differences.a - b.interval.low is -0.1, below 0"),
        ("critics.runs/v1.2=x.mse=-1e3", 0.5, None),
        ("rollouts=9", 8, "rollouts is 8, below 9"),
        ("spearman=0", None, "spearman does not exist for these rollouts (null)"),
        ("auc_interval.low=0", None, "auc_interval.low does not exist for these rollouts (null)"),
        ("by.task.sum.mse=0", None, "by.task.sum.mse does not exist in this verdict"),
    ],
)
def test_a_gate_holds_a_figure_against_a_value(pair, found, reason):
    (gate,) = judge_gates(EvalSettings(data=["x"], fail_under=[pair]).evaluation, RESULT)
    assert gate["metric"] + "=" + pair.rpartition("=")[2] == pair
    assert gate["value"] == float(pair.rpartition("=")[2])
    assert gate["found"] == found
    assert gate["passed"] is (reason is None)
    assert gate["reason"] == reason


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        ("explained_variance=0.25", None),
        ("explained_variance=0.2", "explained_variance is 0.25, above 0.2"),
        ("critics.runs/v1.2=x.mse=0.4", "critics.runs/v1.2=x.mse is 0.5, above 0.4"),
        ("spearman=0", "spearman does not exist for these rollouts (null)"),
    ],
)
def test_a_ceiling_holds_from_the_other_side(pair, reason):
    (gate,) = judge_gates(EvalSettings(data=["x"], fail_over=[pair]).evaluation, RESULT)
    assert (gate["flag"], gate["passed"], gate["reason"]) == ("--fail-over", reason is None, reason)


def events(shard, *gates, **settings):
    return evaluate(EvalSettings(data=[str(shard)], device="cpu", fail_under=list(gates), **settings), StopRequest())


@pytest.mark.parametrize(
    ("metric", "meant"),
    [
        ("explained_varience", "explained_variance"),
        ("explained_variance_interval", "explained_variance_interval.low"),
        ("baselines.stored.msee", "baselines.stored.mse"),
        ("critics.store.mse", "critics.stored.mse"),
        ("words", None),
    ],
)
def test_an_unknown_metric_is_refused_before_anything_is_read(tmp_path, metric, meant):
    shard = write_shard(tmp_path / "a.parquet", branching_rollouts())
    seen = []
    with pytest.raises(ConfigError) as caught:
        seen += events(shard, "mse=0", f"{metric}=0.5")
    assert seen == []
    told = f"--fail-under: no metric {metric!r}"
    assert caught.value.message == told + (f"; did you mean {meant}?" if meant else "")


def test_every_figure_of_a_verdict_can_be_a_gate(tmp_path):
    shard = write_shard(tmp_path / "a.parquet", branching_rollouts())
    names = [
        "mse",
        "baselines.group_mean.lone_rollouts",
        "critics.stored.explained_variance_minus.group_mean.difference",
    ]
    names += ["returns.std", "auc_within_group_interval.high", "by.task.x.mse"]
    *before, last = events(shard, *(f"{name}=-100" for name in names))
    assert any(isinstance(event, Progress) for event in before)
    assert isinstance(last, RunEnded)
    gates = last.result["gates"]
    assert [gate["metric"] for gate in gates] == names
    assert [gate["passed"] for gate in gates] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("pair", ["mse", "=0.1", "mse=", "mse=high", "mse=nan", "mse=inf", ""])
def test_what_is_no_gate_is_refused(pair):
    with pytest.raises(ConfigError, match="--fail-under takes METRIC=VALUE"):
        EvalSettings(data=["x"], fail_under=[pair])
