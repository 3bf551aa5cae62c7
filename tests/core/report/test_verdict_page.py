"""The answer follows from the intervals."""

import pytest

from critic_train.report.report_sources import Record
from critic_train.report.verdict_page import answer, tiles

ABOVE, ACROSS, BELOW = [0.1, 0.3], [-0.1, 0.3], [-0.3, -0.1]


def metrics(interval, against_group, figure=0.2):
    found = {"explained_variance": figure, "explained_variance_interval": interval}
    minus = {"difference": 0.1, "interval": against_group}
    return Record(found | {"explained_variance_minus": {"group_mean": minus}}, "1:x#")


@pytest.mark.parametrize(
    ("interval", "against_group", "mark", "words"),
    [
        (ABOVE, ABOVE, "yes", "Yes: it lowers the variance"),
        (ABOVE, ACROSS, "partly", "not shown to be better than GRPO's baseline"),
        (ABOVE, BELOW, "partly", "GRPO's baseline would do more"),
        (ABOVE, None, "yes", "Yes: it is better than a constant"),
        (ACROSS, ABOVE, "no", "Not yet"),
        (BELOW, ABOVE, "no", "No: PPO would do better with a constant"),
        ([0.0, 0.0], [0.0, 0.0], "no", "Not yet"),
        ([0.0, 0.3], ABOVE, "no", "Not yet"),
        ([-0.3, 0.0], ABOVE, "no", "Not yet"),
        (None, None, "unknown", "too few prompts"),
    ],
)
def test_the_answer(interval, against_group, mark, words):
    found = answer(metrics(interval, against_group))
    assert found.mark == mark
    assert words in found.text


def test_the_figure_alone_says_nothing():
    assert answer(metrics(ACROSS, ABOVE, figure=0.9)).mark == "no"


def test_without_figures_nothing_is_claimed():
    assert answer(Record({}, "")).text.startswith("Not judged yet")
    assert answer(metrics(None, None, figure=None)).text == "Cannot tell: the returns do not vary."


@pytest.mark.parametrize(("against_monte_carlo", "shown"), [(0.2, False), (0.2 + 1e-13, False), (0.1, True)])
def test_monte_carlo_is_a_tile_where_it_says_something_else(against_monte_carlo, shown):
    found = Record({"explained_variance": 0.2, "monte_carlo": {"explained_variance": against_monte_carlo}}, "1:x#")
    names = [tile.name for tile in tiles(found)]
    assert ("against Monte-Carlo returns" in names) is shown
