"""The difference to the critic of step 0, and its interval, against a jackknife written out."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from support import branching_rollouts

from critic_train.evaluation.judge import Judge
from critic_train.rollouts import Rollouts, concat_rollouts
from critic_train.training.against_start import MOST_BLOCKS, HeldOutErrors, beats_start, difference_to_start

LEVEL = 1e5
DRAW = np.random.default_rng(0)


def rollouts_of(groups: int) -> Rollouts:
    """Rollouts of so many prompts, returns of 0 and 1 far from 0."""
    parts = []
    while sum(len(part) for part in parts) < 4 * groups:
        parts.append(branching_rollouts())
    many = concat_rollouts(parts).take(np.arange(4 * groups))
    outcome = LEVEL + (DRAW.random(len(many)) < 0.5)
    returns = np.repeat(outcome, many.lengths).astype(np.float32)
    return replace(many, returns=returns, group=DRAW.permutation(np.arange(len(many)) % groups) + 7)


def errors_of(rollouts: Rollouts, values: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    sums = HeldOutErrors(rollouts.group, LEVEL)
    for start in range(0, len(rollouts), batch):
        part = np.arange(start, min(start + batch, len(rollouts)))
        sums.add(rollouts.take(part), values[rollouts.offsets[part[0]] : rollouts.offsets[part[-1] + 1]])
    return sums.blocks()


def figure(name: str, returns: np.ndarray, values: np.ndarray, group: np.ndarray) -> float:
    error = returns - values
    if name == "mse":
        return float(np.square(error).mean())
    if name == "explained_variance_within_group":
        error, returns = (x - np.array([x[group == g].mean() for g in group]) for x in (error, returns))
    return float(1 - np.var(error) / np.var(returns))


@pytest.mark.parametrize("name", ["explained_variance", "explained_variance_within_group", "mse"])
def test_the_difference_and_its_interval_are_those_of_a_jackknife_over_prompt_groups(name):
    rollouts = rollouts_of(12)
    mask = rollouts.response_mask
    returns, group = rollouts.returns[mask].astype(np.float64), np.repeat(rollouts.group, rollouts.lengths)[mask]
    start, now = (rollouts.returns * share + (1 - share) * LEVEL for share in (0.2, 0.5))
    now, start = (v + DRAW.normal(0, 0.3, len(v)) for v in (now, start))
    now, start = now.astype(np.float32), start.astype(np.float32)
    found = difference_to_start(name, *errors_of(rollouts, now, 7), errors_of(rollouts, start, 48)[1].tolist())

    def difference(kept: np.ndarray) -> float:
        of_now, of_start = (figure(name, returns[kept], v[mask][kept], group[kept]) for v in (now, start))
        return of_now - of_start

    drawn = np.array([difference(group != g) for g in np.unique(group)])
    error = np.sqrt(11 / 12 * np.square(drawn - drawn.mean()).sum())
    shares = np.array([np.square(returns[group == g] - returns.mean()).sum() for g in np.unique(group)])
    effective = shares.sum() ** 2 / np.square(shares).sum()
    half = stats.t.ppf(0.975, (effective - 1) / 2) * error
    whole = difference(np.ones(len(group), dtype=bool))
    assert found["difference"] == pytest.approx(whole, rel=1e-4)
    assert found["interval"] == pytest.approx([whole - half, whole + half], rel=1e-3)


def test_the_difference_is_that_of_the_judge():
    rollouts = rollouts_of(6)
    now, start = (LEVEL + DRAW.random(len(rollouts.returns)).astype(np.float32) for _ in range(2))
    judge = Judge(["now", "start"], cliprange_value=None)
    judge.add(rollouts, {"now": now, "start": start})
    judged = judge.verdict()["differences"]["now - start"]
    found = difference_to_start(
        "explained_variance", *errors_of(rollouts, now, 5), errors_of(rollouts, start, 5)[1].tolist()
    )
    assert found["difference"] == pytest.approx(judged["difference"], abs=1e-6)
    assert found["interval"] == pytest.approx(judged["interval"], abs=1e-5)


def test_many_prompts_are_summed_in_blocks():
    rollouts = rollouts_of(450)
    values = rollouts.returns + DRAW.normal(0, 0.4, len(rollouts.returns)).astype(np.float32)
    returns, errors = errors_of(rollouts, values, 200)
    assert len(returns) == len(errors) == MOST_BLOCKS
    assert returns[:, 0].sum() == rollouts.response_mask.sum()
    same = difference_to_start("explained_variance", returns, errors, errors.tolist())
    assert same == {"difference": 0.0, "interval": [0.0, 0.0]}


@pytest.mark.parametrize(
    ("name", "interval", "beats"),
    [
        ("explained_variance", [0.001, 0.01], True),
        ("explained_variance", [0.0, 0.01], False),
        ("explained_variance", [-0.01, 0.3], False),
        ("mse", [-0.2, -0.1], True),
        ("mse", [0.1, 0.2], False),
        ("mse", None, False),
    ],
)
def test_an_interval_beats_the_start_where_all_of_it_is_better(name, interval, beats):
    assert beats_start(name, {"difference": 0.0, "interval": interval}) is beats


def test_returns_that_are_all_equal_have_no_difference():
    rollouts = rollouts_of(4)
    rollouts = replace(rollouts, returns=np.full_like(rollouts.returns, 1.0))
    returns, errors = errors_of(rollouts, np.zeros_like(rollouts.returns), 3)
    assert difference_to_start("explained_variance", returns, errors, errors.tolist()) == {
        "difference": None,
        "interval": None,
    }
