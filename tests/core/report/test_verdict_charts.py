"""Charts of a verdict, and the tables below them."""

from critic_train.report.compared_critics import critics_of
from critic_train.report.report_sources import evaluation_source
from critic_train.report.verdict_charts import LABELS_DRAWN, by_column, where_charts


def charts_of(**metrics):
    return critics_of([evaluation_source({"critics": {"runs/a": metrics}, "baselines": {}, "models": ["runs/a"]})])


def labels(count, **more):
    return {
        f"v{n:02}": {"tokens": n, "rollouts": 1, "explained_variance": 0.1, "mse": 0.2, **more} for n in range(count)
    }


def test_what_has_no_figures_has_no_chart():
    assert where_charts(charts_of(explained_variance=0.2)) == []
    assert by_column(charts_of(by={"task": {"x": {"tokens": 1, "explained_variance": None}}}), "task") is None


def test_a_column_of_many_values_draws_the_largest_and_lists_more():
    chart = by_column(charts_of(by={"task": labels(30)}), "task")
    assert chart.note.endswith(f"The largest {LABELS_DRAWN} of 30.")
    assert chart.svg.count("v29") == 1
    assert "v05" not in chart.svg
    assert [row[0].text for row in chart.table[1:]] == [f"v{n:02}" for n in range(29, -1, -1)]


def test_a_column_has_the_metrics_of_its_table_auc_only_where_there_is_one():
    headings = ["task", "rollouts", "tokens", "explained variance", "within prompts", "MSE", "bias"]
    assert by_column(charts_of(by={"task": labels(2)}), "task").table[0] == headings
    with_auc = by_column(charts_of(by={"task": labels(2, auc_within_group=0.7)}), "task").table
    assert with_auc[0] == [*headings[:5], "AUC within prompts", *headings[5:]]
    assert with_auc[1][5].text == "0.700"
