"""What a page is about, as read from disk; names, and where figures stand."""

import pytest

from critic_train.report.report_sources import Cell, Record, short_names


@pytest.mark.parametrize(
    ("paths", "short"),
    [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["x/a", "y/a"], ["x/a", "y/a"]),
        (["x/checkpoints/a", "y/checkpoints/a"], ["x/a", "y/a"]),
        (["x/checkpoints/a", "y/a"], ["checkpoints/a", "y/a"]),
        (["/tmp/runs/a"], ["a"]),
        (["/"], ["/"]),
        (["a", "a"], ["a", "a"]),
    ],
)
def test_names_are_as_short_as_they_can_be(paths, short):
    assert short_names(paths) == short


def test_a_figure_knows_where_it_stands():
    record = Record({"a/b~c": {"rows": [{"x": 0.25}, 3]}, "none": None}, "1:eval.json#")
    [row] = record.part("a/b~c").rows("rows")  # what is no object is left out
    assert row.cell("x") == Cell("0.250", "0.25", "1:eval.json#/a~1b~0c/rows/0/x")
    assert record.cell("none") == record.cell("missing") == Cell("-")
    assert not record.part("missing")
    assert record.rows("missing") == []


def test_a_figure_that_is_not_there_is_a_dash():
    assert Record({"mse": 0.12345}, "").cell("mse").text == "0.123"
    assert Record({}, "").cell("mse") == Record({"mse": None}, "").cell("mse")
    assert Record({"mse": 3}, "").cell("mse", str).text == "3"
