"""How figures are written."""

import math

import pytest

from critic_train import text as figures


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, "words", True])
@pytest.mark.parametrize("write", ["fixed", "short", "three", "signed", "percent", "count", "format_bytes", "duration"])
def test_a_figure_that_does_not_exist_is_a_dash(write, missing):
    assert getattr(figures, write)(missing) == "-"


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        ("fixed", 0.4119, "0.412"),
        ("fixed", -1.8, "-1.800"),
        ("short", 0.042131, "0.04213"),
        ("short", 4.7e-5, "4.7e-05"),
        ("three", 0.1, "0.100"),
        ("three", 0.07076, "0.0708"),
        ("three", 123.4, "123"),
        ("signed", 0.004, "+0.0040"),
        ("signed", 0.0, "+0.0000"),
        ("signed", 1e-7, "+1e-07"),
        ("signed", -1234.5, "-1.23e+03"),
        ("signed", -0.12, "-0.1200"),
        ("percent", 0.031, "3.1 %"),
        ("percent", 0, "0.0 %"),
        ("count", 0, "0"),
        ("count", 950, "950"),
        ("count", 7.254, "7.25"),
        ("count", 12345.6, "12.3k"),
        ("count", 999_600, "1.00M"),
        ("count", 4_560_000, "4.56M"),
        ("format_bytes", 812, "812 B"),
        ("format_bytes", 5_100_000, "5.1 MB"),
        ("format_bytes", 272_000_000, "272 MB"),
        ("format_bytes", 1.23e12, "1.2 TB"),
        ("duration", 7, "0:07"),
        ("duration", 59.6, "1:00"),
        ("duration", 754, "12:34"),
        ("duration", 11_100, "3:05:00"),
        ("duration", 3 * 86400 + 11_100, "3d 03:05"),
        ("duration", -1, "-"),
    ],
)
def test_figures(write, value, text):
    assert getattr(figures, write)(value) == text


@pytest.mark.parametrize(
    ("bounds", "text"),
    [([0.38, 0.441], "[0.380, 0.441]"), (None, ""), ([None, 0.4], ""), ([0.1], ""), ([math.nan, 1.0], "")],
)
def test_intervals(bounds, text):
    assert figures.interval(bounds) == text
    assert figures.with_interval(0.41, bounds) == f"0.410 {text}".rstrip()
