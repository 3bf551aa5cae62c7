"""The chart of what critics are worth in rollouts."""

from conftest import verdict_of

from critic_train.report.compared_critics import critics_of
from critic_train.report.report_sources import evaluation_source
from critic_train.report.worth_chart import worth_chart


def charted(*names, **changes):
    verdict = verdict_of(list(names), **changes) | {"models": list(names)}
    return verdict, worth_chart(critics_of([evaluation_source(verdict)]))


def test_a_line_for_the_groups_mean_the_critic_and_what_is_fused():
    verdict, chart = charted("m/x")
    assert [key.text for key in chart.keys] == ["prompt group's mean", "this critic alone", "fused with that mean"]
    rows = verdict["critics"]["m/x"]["worth"]["by_rollouts"]
    assert [row[0] for row in chart.table[1:]] == [*(str(row["rollouts"]) for row in rows), "a critic alone"]
    first, alone = chart.table[1], chart.table[-1]
    assert float(first[1].value) == rows[0]["group_mean"]["advantage_variance"]
    assert float(first[3].value) == rows[0]["fused"]["advantage_variance"]
    assert first[3].at.endswith("#/critics/m~1x/worth/by_rollouts/0/fused/advantage_variance")
    assert float(alone[3].value) == verdict["critics"]["m/x"]["worth"]["critic"]["advantage_variance"]


def test_several_critics_have_a_colour_each():
    _, chart = charted("m/x", "m/y")
    assert [key.text for key in chart.keys] == ["prompt group's mean", "x", "y"]
    assert "var(--series-2)" in chart.svg
    assert chart.table[0][3] == "x, fused"


def test_an_evaluation_from_before_has_none():
    verdict, _ = charted("m/x")
    del verdict["critics"]["m/x"]["worth"]
    assert worth_chart(critics_of([evaluation_source(verdict)])) is None
