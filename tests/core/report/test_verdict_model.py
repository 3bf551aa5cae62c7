"""What the terminal and the page draw of a verdict."""

import pytest

from critic_train.report.report_sources import Record
from critic_train.report.verdict_model import (
    COMPARISON,
    auc_series,
    baseline_differences,
    baseline_series,
    calibration_series,
    counts,
    critic_differences,
    evaluation_series,
    label_rows,
    policy_columns,
    predictions_of,
    return_figures,
    shown_name,
    table_columns,
    terminal_columns,
)


@pytest.mark.parametrize(
    ("name", "shown"),
    [("constant", "constant mean"), ("group_mean", "prompt group's mean"), ("runs/a", "runs/a")],
)
def test_baselines_have_names_of_their_own(name, shown):
    assert shown_name(name) == shown


def test_stored_values_that_are_judged_are_no_baseline_as_well():
    verdict = {"critics": {"stored": {"mse": 1}}, "baselines": {"constant": {"mse": 2}, "stored": {"mse": 1}}}
    names = [name for name, _ in predictions_of(Record(verdict, ""))]
    assert names == ["stored values", "constant mean"]


def test_columns_are_those_of_the_list_of_metrics():
    labels = [[column.label for column in terminal_columns(topics)] for topics in COMPARISON]
    assert labels == [
        ["explained variance", "within prompts", "Pearson", "Spearman"],
        ["MSE", "MAE", "bias", "value loss", "clipfrac"],
    ]
    labels = [[column.label for column in table_columns(table)] for table in ("by_position", "by")]
    assert labels == [
        ["explained variance", "MSE", "bias"],
        ["explained variance", "within prompts", "AUC within prompts", "MSE", "bias"],
    ]


def test_a_column_is_empty_where_nobody_has_a_figure():
    auc = table_columns("by")[2]
    assert auc.optional
    assert auc.is_empty([Record({}, ""), Record({"auc_within_group": None}, "")])
    assert not auc.is_empty([Record({}, ""), Record({"auc_within_group": 0.5}, "")])


def test_a_reduction_of_variance_is_shown_as_a_change():
    record = Record({"variance_reduction": 0.231, "variance_reduction_interval": [0.12, 0.314]}, "")
    texts = [column.cell(record).text for column in policy_columns()]
    assert texts == ["-", "-", "-23 % [-31, -12]", "-", "-", "-"]


def test_differences_have_the_labels_of_their_metrics():
    paired = {"difference": 0.01, "interval": None}
    others = {"mse": {"difference": -0.03, "interval": [-0.1, 0.1]}, "auc_within_group": {"difference": None}}
    others |= {"of_a_later_release": paired}
    verdict = Record({"differences": {"a - b": paired | others}}, "")
    shown = [(d.other, d.metric, d.difference.text, d.interval.text) for d in critic_differences(verdict)]
    assert shown == [
        ("a - b", "explained variance", "+0.010", ""),
        ("a - b", "MSE", "-0.030", "[-0.100, 0.100]"),
        ("a - b", "of_a_later_release", "+0.010", ""),
    ]
    critic = Record({"explained_variance_minus": {"stored": paired, "group_mean": {"difference": None}}}, "")
    assert [d.other for d in baseline_differences(critic)] == ["stored"]


def test_what_was_judged_on():
    verdict = Record({"rollouts": 2048, "prompt_groups": 256, "returns": {"mean": 0.5, "std": None}}, "")
    assert [(name, cell.text) for name, cell in counts(verdict)] == [("rollouts", "2,048"), ("prompt groups", "256")]
    assert {name: cell.text for name, cell in return_figures(verdict).items()} == {
        "mean": "0.5",
        "std": "-",
        "min": "-",
        "max": "-",
    }
    assert return_figures(Record({}, "")) == {}


def test_points_without_a_figure_are_left_out():
    bins = [{"mean_value": 0.1, "mean_return": 0.2, "interval": [0.0, 0.3]}, {"mean_value": None, "mean_return": 1}]
    series = calibration_series(Record({"calibration": bins}, ""))
    assert (series.x, series.y, series.intervals) == ([0.1], [0.2], [[0.0, 0.3]])
    parts = [{"from": 0.0, "to": 0.5, "auc_within_group": None}, {"from": 0.5, "to": 1.0, "auc_within_group": 0.9}]
    series = auc_series(Record({"auc_by_position": parts}, ""))
    assert (series.x, series.y, series.intervals) == ([75.0], [0.9], [None])
    assert not calibration_series(Record({}, ""))


def test_a_baseline_by_step_may_have_gaps():
    rows = [
        {"step": step, "explained_variance": step / 10, "baselines": {"stored": {"explained_variance": figure}}}
        for step, figure in ((0, 0.5), (5, None), (9, 0.5))
    ]
    evaluations = [Record(row, f"{number}#") for number, row in enumerate(rows)]
    critic = evaluation_series(evaluations, "explained_variance")
    assert (critic.x, critic.y) == ([0, 5, 9], [0.0, 0.5, 0.9])
    stored = baseline_series(critic.rows, "explained_variance", "stored")
    assert (stored.x, stored.y) == ([0, 9], [0.5, 0.5])
    assert not baseline_series(critic.rows, "explained_variance", "group_mean")


def test_values_of_a_column_with_most_tokens_first():
    by = {"task": {"few": {"tokens": 1}, "many": {"tokens": 9}, "none": {}}}
    assert list(label_rows(Record({"by": by}, ""), "task")) == ["many", "few", "none"]
