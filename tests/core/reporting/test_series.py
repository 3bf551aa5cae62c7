"""Tables of several critics."""

from types import SimpleNamespace

from critic_train.reporting.records import Record
from critic_train.reporting.series import table_of


def test_each_critic_s_rows_stand_below_its_name_where_there_are_several():
    rows = [Record({"n": 1}, "x"), Record({"n": 2}, "y")]
    first, second = SimpleNamespace(name="first"), SimpleNamespace(name="second")

    def cells(row):
        return [row.get("n"), -row.get("n")]

    assert table_of([(first, rows)], ["n", "less"], cells) == [["n", "less"], [1, -1], [2, -2]]
    both = table_of([(first, rows), (second, rows[:1])], ["n", "less"], cells)
    assert both == [["n", "less"], ["first", ""], [1, -1], [2, -2], ["second", ""], [1, -1]]
