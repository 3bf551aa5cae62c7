"""A curve in one line."""

import math

import pytest

from critic_train_cli.terminal import sparkline


def test_lowest_and_highest_marks_are_the_least_and_greatest_values():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([7.0, 0.0, 3.5]) == "█▁▅"


def test_ascii_marks():
    assert sparkline([0, 7], unicode=False) == "_#"
    assert sparkline(range(8), unicode=False).isascii()


def test_more_values_than_columns_are_averaged_in_stretches():
    assert sparkline([0, 0, 10, 30, 20, 20], width=3) == "▁██"
    assert len(sparkline(list(range(1000)), width=7)) == 7


def test_what_is_no_number_is_left_out():
    assert sparkline([0, None, math.nan, math.inf, 7]) == "▁█"


@pytest.mark.parametrize(("values", "line"), [([], ""), ([None], ""), ([3], "▁"), ([3, 3, 3], "▁▁▁")])
def test_little_or_no_course(values, line):
    assert sparkline(values) == line


def test_no_room():
    assert sparkline([1, 2], width=0) == ""


def test_a_span_beyond_the_largest_float():
    assert sparkline([-1.7e308, 0.0, 1.7e308]) == "▁▅█"
