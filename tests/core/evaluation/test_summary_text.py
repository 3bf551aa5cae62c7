"""The sentences follow the intervals, not the figures."""

import numpy as np
import pytest

from critic_train.evaluation.judge import Judge
from critic_train.evaluation.summary_text import summary_text


def metrics(ev=0.31, interval=(0.22, 0.39), versus=(0.1, 0.05, 0.15), inside=(0.12, 0.05, 0.2), **more):
    return {
        "explained_variance": ev,
        "explained_variance_interval": None if interval is None else list(interval),
        "explained_variance_within_group": inside[0],
        "explained_variance_within_group_interval": list(inside[1:]),
        "explained_variance_minus": {"group_mean": {"difference": versus[0], "interval": list(versus[1:])}},
        "mse": 1.0,
        "bias": 0.0,
        "saturation": None,
        **more,
    }


def verdict(*critics, groups=10, lone=0, differences=None):
    return {
        "rollouts": 80,
        "response_tokens": 800,
        "prompt_groups": groups,
        "critics": {f"c{i}": c for i, c in enumerate(critics)},
        "baselines": {
            "stored": {**metrics(), "explained_variance": 0.2},
            "group_mean": {"explained_variance": 0.33, "lone_rollouts": lone},
        },
        "differences": differences or {},
    }


@pytest.mark.parametrize(
    ("interval", "start"),
    [
        ((0.22, 0.39), "beats the constant baseline: explained variance 0.31 (95 % interval 0.22 to 0.39)"),
        ((-0.01, 0.6), "cannot tell whether it beats the constant baseline: explained variance 0.31"),
        ((-0.4, -0.1), "is worse than the constant baseline"),
        ((0.0, 0.0), "is no better than the constant baseline"),
        ((0.001, 0.6), "beats the constant baseline: explained variance 0.31 (95 % interval 0.001 to 0.60)"),
    ],
)
def test_against_the_constant(interval, start):
    assert summary_text(verdict(metrics(interval=interval)))[0].startswith(start)


@pytest.mark.parametrize(
    ("versus", "sentence"),
    [
        ((0.1, 0.05, 0.15), "beats the prompt group's mean (0.33): explained variance higher by 0.10 (0.05 to 0.15)"),
        ((-0.1, -0.15, -0.05), "does not beat the prompt group's mean (0.33): explained variance lower by 0.10"),
        ((-0.1, -0.15, -0.05), "(0.05 to 0.15); it adds no token-level credit over GRPO's baseline"),
        ((0.1, -0.05, 0.15), "cannot tell whether it beats the prompt group's mean (0.33), GRPO's baseline"),
        ((0.1, -0.05, 0.15), "differs by 0.10 (-0.05 to 0.15)"),
    ],
)
def test_against_the_group_mean(versus, sentence):
    assert sentence in summary_text(verdict(metrics(versus=versus)))[1]


@pytest.mark.parametrize(
    ("inside", "sentence"),
    [
        ((0.12, 0.05, 0.2), "within prompt groups it explains 0.12 (0.05 to 0.20): it tells"),
        ((0.12, -0.05, 0.2), "cannot tell whether it explains anything within prompt groups: 0.12 (-0.05 to 0.20)"),
        ((-0.2, -0.3, -0.1), "within prompt groups it explains nothing: -0.20 (-0.30 to -0.10); it adds noise"),
        ((0.0, 0.0, 0.0), "within prompt groups it explains nothing: 0.00"),
    ],
)
def test_within_prompt_groups(inside, sentence):
    assert summary_text(verdict(metrics(inside=inside)))[2].startswith(sentence)


def test_against_the_stored_values_and_itself():
    def said(difference, interval):
        critic = metrics()
        critic["explained_variance_minus"]["stored"] = {"difference": difference, "interval": interval}
        return summary_text(verdict(critic))[3:]

    assert said(0.11, [0.1, 0.12]) == [
        "beats the stored values (0.20): explained variance higher by 0.11 (0.10 to 0.12)"
    ]
    assert said(-0.11, [-0.2, -0.1])[0].startswith("is worse than the stored values")
    assert said(0.11, [-0.2, 0.3])[0].startswith("cannot tell whether it beats the stored values")
    assert said(0.0, [0.0, 0.0]) == []


@pytest.mark.parametrize(
    ("auc", "bounds", "start", "sentence"),
    [
        (
            0.71,
            [0.6, 0.8],
            0.3,
            "tells right rollouts from wrong ones from 30 % of the response on: within prompts, AUC 0.71",
        ),
        (
            0.71,
            [0.6, 0.8],
            0.0,
            "tells right rollouts from wrong ones from the first token on: within prompts, AUC 0.71",
        ),
        (
            0.71,
            [0.6, 0.8],
            None,
            "on the whole it tells right rollouts from wrong ones, but not at the end of the response",
        ),
        (
            0.52,
            [0.4, 0.6],
            None,
            "cannot tell whether it tells right rollouts from wrong ones: within prompts, AUC 0.52",
        ),
        (0.52, [0.4, 0.6], 0.9, "tells right rollouts from wrong ones from 90 % of the response on"),
        (
            0.30,
            [0.2, 0.4],
            None,
            "calls wrong rollouts better than right ones: within prompts, AUC 0.30 (0.20 to 0.40)",
        ),
    ],
)
def test_right_and_wrong(auc, bounds, start, sentence):
    found = {"auc_within_group": auc, "auc_within_group_interval": bounds, "tells_apart_from": start}
    assert summary_text(verdict(metrics(**found)))[3].startswith(sentence)


@pytest.mark.parametrize(
    ("reduction", "bounds", "sentence"),
    [
        (0.231, [0.1, 0.3], "PPO's advantages vary less with it than GRPO's: 23 % (10 to 30 %)"),
        (-0.231, [-0.3, -0.1], "PPO's advantages vary more with it than GRPO's: 23 % (10 to 30 %)"),
        (0.05, [-0.1, 0.2], "cannot tell whether PPO's advantages vary less with it than GRPO's: 5 % (-10 to 20 %)"),
    ],
)
def test_the_variance_of_advantages(reduction, bounds, sentence):
    found = {"variance_reduction": reduction, "variance_reduction_interval": bounds}
    assert summary_text(verdict(metrics(**found)))[3] == sentence


@pytest.mark.parametrize(
    ("figure", "bounds", "excess", "said"),
    [
        (0.30, [0.2, 0.4], (0.01, [0.005, 0.02]), None),
        (0.20, [0.1, 0.3], (0.11, [0.1, 0.12]), "explained variance is 0.20 (0.10 to 0.30); the returns flatter it"),
        (0.20, [0.1, 0.3], (0.11, [-0.1, 0.3]), None),
        (0.02, [-0.1, 0.1], (0.29, [-0.1, 0.6]), "explained variance is 0.02 (-0.10 to 0.10); the returns flatter it"),
        (0.50, [0.4, 0.6], (-0.19, [-0.2, -0.1]), "explained variance is 0.50 (0.40 to 0.60)"),
    ],
)
def test_against_monte_carlo_returns_only_where_it_is_another_finding(figure, bounds, excess, said):
    found = {
        "explained_variance": figure,
        "explained_variance_interval": bounds,
        "explained_variance_excess": {"difference": excess[0], "interval": excess[1]},
    }
    rest = summary_text(verdict(metrics(monte_carlo=found)))[3:]
    assert rest == ([] if said is None else [f"against Monte-Carlo returns {said}"])


def test_offsets_and_saturation_are_mentioned_when_large():
    assert len(summary_text(verdict(metrics(bias=0.3, saturation=0.04)))) == 3
    said = summary_text(verdict(metrics(bias=-0.4, saturation=0.12)))
    assert said[3].startswith("its values lie 0.40 below the returns on average")
    assert said[4].startswith("12 % of tokens lie beyond the clip")


def test_several_critics_are_named_and_compared():
    said = summary_text(
        verdict(metrics(), metrics(), differences={"c0 - c1": {"difference": -0.2, "interval": [-0.3, -0.1]}})
    )
    assert said[0].startswith("c0: beats the constant")
    assert said[3].startswith("c1: beats the constant")
    assert said[-1] == "c1 beats c0: explained variance higher by 0.20 (0.10 to 0.30)"
    said = summary_text(
        verdict(metrics(), metrics(), differences={"c0 - c1": {"difference": -0.2, "interval": [-0.3, 0.1]}})
    )
    assert said[-1] == "cannot tell c0 from c1: explained variance differs by -0.20 (-0.30 to 0.10)"


def test_what_cannot_be_compared_is_said():
    assert summary_text(verdict(metrics(interval=None), groups=1))[0] == (
        "cannot tell whether it beats the constant baseline: explained variance 0.31, from one prompt: too few for an "
        "interval, which takes 30 or more"
    )
    assert summary_text(verdict(metrics(), lone=80))[1].startswith("every prompt has one rollout only")
    assert summary_text(verdict(metrics(ev=None)))[0].startswith("the returns do not vary")
    assert summary_text(Judge(["c"]).verdict()) == ["no rollouts: there is nothing to judge on"]


@pytest.mark.parametrize("critics", [["a"], ["a", "b"], []])
def test_any_verdict_can_be_said(world, critics):
    rollouts, values = world(9)
    judge = Judge(critics, resamples=20)
    for part in (np.array([0]), np.arange(1, len(rollouts))):
        some = rollouts.take(part)
        tokens = np.isin(np.repeat(rollouts.row, rollouts.lengths), some.row)
        judge.add(some, {name: values[name][tokens] for name in critics})
        said = summary_text(judge.verdict())
        assert said
        assert not any("nan" in s or "None" in s for s in said)
