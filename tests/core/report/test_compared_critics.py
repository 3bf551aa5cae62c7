"""Tables of several critics."""

from types import SimpleNamespace

from critic_train.report.compared_critics import table_of
from critic_train.report.report_sources import Record


def test_each_critic_s_rows_stand_below_its_name_where_there_are_several():
    rows = [Record({"n": 1}, "x"), Record({"n": 2}, "y")]
    first, second = SimpleNamespace(name="first"), SimpleNamespace(name="second")

    def cells(row):
        return [row.get("n"), -row.get("n")]

    assert table_of([(first, rows)], ["n", "less"], cells) == [["n", "less"], [1, -1], [2, -2]]
    both = table_of([(first, rows), (second, rows[:1])], ["n", "less"], cells)
    assert both == [["n", "less"], ["first", ""], [1, -1], [2, -2], ["second", ""], [1, -1]]
