"""Explained variance from two sums of squares."""

import pytest

from critic_train.evaluation.metric_sums import explained_variance


@pytest.mark.parametrize(
    ("error_squares", "return_squares", "figure"),
    [
        (0.0, 2.0, 1.0),
        (1.5, 2.0, 0.25),
        (5.0, 2.0, -1.5),
        (2.0 + 2.0**-50, 2.0, 0.0),  # a rounding is not a difference: the constant explains exactly nothing
        (2.0 - 2.0**-50, 2.0, 0.0),
        (2.0 + 1e-9, 2.0, pytest.approx(-5e-10, rel=1e-5)),
        (1.0, 0.0, None),
        (0.0, 0.0, None),
    ],
)
def test_explained_variance(error_squares, return_squares, figure):
    assert explained_variance(error_squares, return_squares) == figure
