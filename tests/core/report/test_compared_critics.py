"""Tables of several critics."""

from types import SimpleNamespace

from critic_train.report.compared_critics import table_of
from critic_train.report.report_sources import Record
from critic_train.report.verdict_model import Column


def test_each_critic_s_rows_stand_below_its_name_where_there_are_several():
    rows = [Record({"n": 1}, "x"), Record({"n": 2}, "y")]
    first, second = SimpleNamespace(name="first"), SimpleNamespace(name="second")

    columns = [
        Column(label="n", heading="n", cell=lambda row: row.get("n")),
        Column(label="less", heading="less", cell=lambda row: -row.get("n")),
    ]
    assert table_of([(first, rows)], columns) == [["n", "less"], [1, -1], [2, -2]]
    both = table_of([(first, rows), (second, rows[:1])], columns)
    assert both == [["n", "less"], ["first", ""], [1, -1], [2, -2], ["second", ""], [1, -1]]
