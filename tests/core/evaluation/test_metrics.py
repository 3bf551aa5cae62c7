"""The list of metrics, and that all else follows from it."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from support import branching_rollouts, readable_rollouts, write_shard

from critic_train.callbacks.trackers import evaluation_metrics
from critic_train.evaluation import metrics
from critic_train.evaluation.evaluate import evaluate
from critic_train.evaluation.judge import Judge
from critic_train.evaluation.metric_sums import mean_square
from critic_train.evaluation.metrics import Metric, is_better
from critic_train.events import EvaluationEnded, RunEnded
from critic_train.report.page import render
from critic_train.report.report_sources import evaluation_source
from critic_train.settings import EvalSettings
from critic_train.settings.training_sections import BestBy
from critic_train.stopping import StopRequest
from critic_train_cli.verdict_tables import draw_verdict

DECLARED = metrics.METRICS
PAGE = Path(__file__).parents[3] / "docs" / "reference" / "metrics.md"


def test_the_choices_of_best_by_are_those_of_the_list():
    assert get_args(BestBy) == tuple(metric.name for metric in DECLARED if metric.best_by)


@pytest.mark.parametrize(("name", "lower"), [("explained_variance", False), ("mse", True), ("value_loss", True)])
def test_which_way_is_better(name, lower):
    assert is_better(name, 0.1, 0.2) is lower
    assert is_better(name, 0.2, 0.1) is not lower
    assert not is_better(name, 0.1, 0.1)


def test_the_page_of_metrics_has_a_row_for_each():
    """In the order of the JSON, each with which way is better and what it needs."""
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \| [^|]+ \|$", PAGE.read_text(), flags=re.MULTILINE)
    assert rows == [(metric.name, metric.better, metric.needs) for metric in DECLARED]


TOY = Metric(
    name="rms_error",
    label="RMS error",
    topic="errors",
    compute=lambda sums: mean_square(sums) ** 0.5,
    better="lower",
    samples=lambda sums: None if sums.resampled is None else np.sqrt(sums.resampled[0].mean_square),
    tables=frozenset({"by_position", "by_length", "by", "monte_carlo"}),
    compared=True,
    best_by=True,
    tracker="critic/rms_error",
    page="with interval",
    tile=9,
    about="root of the MSE",
)


@pytest.fixture(scope="module")
def with_toy() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "METRICS", (*metrics.METRICS, TOY))
        yield


@pytest.fixture(scope="module")
def result(with_toy, tmp_path_factory) -> dict[str, Any]:
    """Of an evaluation of stored values, with the toy metric in the list and two gates on it."""
    path = write_shard(tmp_path_factory.mktemp("toy") / "a.parquet", branching_rollouts())
    table = pq.read_table(path)
    pq.write_table(table.append_column("task", [["x"] * len(table)]), path)
    gates = ["rms_error=1e-9", "rms_error_interval.high=100"]
    settings = EvalSettings(data=[str(path)], device="cpu", by=["task"], fail_over=gates)
    *_, last = evaluate(settings, StopRequest())
    assert isinstance(last, RunEnded)
    return json.loads(json.dumps(last.result))


def test_a_new_metric_is_in_the_json_with_its_interval(result):
    stored = result["critics"]["stored"]
    assert stored["rms_error"] == pytest.approx(stored["mse"] ** 0.5)
    low, high = stored["rms_error_interval"]
    assert 0 <= low <= high
    assert result["rms_error"] == stored["rms_error"]  # the first critic's, at the top level
    assert "rms_error" in result["baselines"]["constant"]
    for row in (*stored["by_position"], *stored["by_length"], *stored["by"]["task"].values()):
        assert row["rms_error"] == pytest.approx(row["mse"] ** 0.5)


def test_a_new_metric_is_compared_between_critics(with_toy):
    rollouts = readable_rollouts(6)
    judge = Judge(["a", "b"])
    judge.add(rollouts, {"a": rollouts.returns, "b": rollouts.returns + np.float32(1)})
    difference = judge.verdict()["differences"]["a - b"]["rms_error"]
    assert difference["difference"] == pytest.approx(-1)
    assert difference["interval"] == pytest.approx([-1, -1])


def test_a_new_metric_is_in_the_terminal_and_on_the_page(result):
    stream = io.StringIO()
    draw_verdict(Console(file=stream, width=200), result)
    assert re.search(r"^ +.*\bRMS\b", stream.getvalue(), flags=re.MULTILINE)
    figure = metrics.fixed(result["rms_error"])
    [row] = [line for line in stream.getvalue().splitlines() if line.startswith("stored values ") and "%" in line][:1]
    assert figure in row
    page = render([evaluation_source(result)])
    assert "<th>RMS error</th>" in page  # a row of the comparison, and a heading of the tables
    assert "root of the MSE" in page  # its tile
    assert "#/critics/stored/rms_error_interval" in page


def test_a_new_metric_has_a_name_in_trackers_and_can_choose_the_best(with_toy):
    event = EvaluationEnded(step=1, metrics={"rms_error": 0.5, "rms_error_interval": [0.4, 0.6]}, best=True)
    names = {"critic/rms_error": 0.5, "critic/rms_error_low": 0.4, "critic/rms_error_high": 0.6}
    assert evaluation_metrics(event) == names
    assert is_better("rms_error", 0.1, 0.2)


def test_a_new_metric_can_be_a_gate(result):
    """Before anything is read, a name that is not in the list is refused: see test_evaluate_gates."""
    assert [gate["passed"] for gate in result["gates"]] == [False, True]
