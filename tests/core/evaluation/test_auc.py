"""AUC against scikit-learn, scipy and loops over all pairs."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from critic_train.evaluation.auc import PairsOverall, correct_rollouts, pairs_within, tells_apart_from
from critic_train.evaluation.judge import Judge
from critic_train.evaluation.resampling import draws
from critic_train.evaluation.summary_text import summary_text
from critic_train.rollouts import Rollouts

RESAMPLES, SEED = 40, 5


def binary(world, seed, **options):
    """A world whose rollouts end in 0 or 1 (returns before the end are something else), its critics told of it."""
    rollouts, values = world(seed, **options)
    rng = np.random.default_rng(seed)
    outcome = rng.random(len(rollouts)) < 0.4
    returns = rollouts.returns.copy()
    last = np.array([np.flatnonzero(rollouts.response_mask[:stop])[-1] for stop in rollouts.offsets[1:]])
    returns[last] = np.where(outcome, 2.0, -1.0)
    lean = np.repeat(np.where(outcome, 0.15, 0.0), rollouts.lengths) * rng.random(len(returns))
    values = {name: np.round(column / 4 + lean, 1).astype(np.float32) for name, column in values.items()}
    return replace(rollouts, returns=returns), values, outcome


def judged(rollouts, values, parts=1):
    judge = Judge(list(values), resamples=RESAMPLES, seed=SEED)
    for index in np.array_split(np.arange(len(rollouts)), parts):
        tokens = np.isin(np.repeat(np.arange(len(rollouts)), rollouts.lengths), index)
        judge.add(rollouts.take(index), {name: column[tokens] for name, column in values.items()})
    return judge.verdict()


def mean_values(rollouts, values, part=None):
    """Mean value of each rollout over its response, or over one tenth of it; None where it has no token there."""
    found = []
    for start, stop in itertools.pairwise(rollouts.offsets.tolist()):
        mine = values[start:stop][rollouts.response_mask[start:stop]].astype(float)
        if part is not None:
            mine = np.array([x for k, x in enumerate(mine) if 10 * k // len(mine) == part])
        found.append(float(np.float32(mine.mean())) if len(mine) else None)
    return found


def all_pairs(scores, outcome, group):
    """Pairs told apart rightly and pairs in all, within groups, by looking at every pair."""
    told = pairs = 0.0
    for i, j in itertools.permutations(range(len(scores)), 2):
        if group[i] == group[j] and outcome[i] and not outcome[j] and None not in (scores[i], scores[j]):
            pairs += 1
            told += float(scores[i] > scores[j]) + 0.5 * float(scores[i] == scores[j])
    return told, pairs


@pytest.mark.parametrize(("seed", "parts"), [(0, 1), (1, 7)])
def test_auc_equals_that_of_scikit_learn_and_of_all_pairs(world, seed, parts):
    rollouts, values, outcome = binary(world, seed, rollouts=60, groups=12)
    verdict = judged(rollouts, values, parts)
    for name in ("a", "b"):
        found = verdict["critics"][name]
        scores = mean_values(rollouts, values[name])
        assert len(set(scores)) < len(scores)  # there are ties
        assert found["auc"] == pytest.approx(roc_auc_score(outcome, scores), abs=1e-9)
        of_right, of_wrong = (np.array(scores)[outcome == side] for side in (True, False))
        u = scipy.stats.mannwhitneyu(of_right, of_wrong).statistic
        assert found["auc"] == pytest.approx(u / (len(of_right) * len(of_wrong)), abs=1e-9)
        told, pairs = all_pairs(scores, outcome, rollouts.group)
        assert found["auc_within_group"] == pytest.approx(told / pairs, abs=1e-9)
        for k, row in enumerate(found["auc_by_position"]):
            told, pairs = all_pairs(mean_values(rollouts, values[name], k), outcome, rollouts.group)
            assert (row["from"], row["to"], row["pairs"]) == (k / 10, (k + 1) / 10, pairs)
            assert row["auc_within_group"] == (pytest.approx(told / pairs, abs=1e-9) if pairs else None)


@pytest.mark.usefixtures("bootstrap")
def test_intervals_equal_a_resampling_by_hand(world):
    rollouts, values, outcome = binary(world, 3, rollouts=50, groups=8)
    verdict = judged(rollouts, values, 3)
    keys = np.unique(rollouts.group)
    drawn = {name: ([], []) for name in values}
    for counts in np.concatenate(list(draws(len(keys), RESAMPLES, SEED))):
        weight = counts[np.searchsorted(keys, rollouts.group)]
        for name, column in values.items():
            scores = mean_values(rollouts, column)
            drawn[name][0].append(roc_auc_score(outcome, scores, sample_weight=weight))
            parts = np.array([all_pairs(scores, outcome, np.where(rollouts.group == k, 0, range(1, 51))) for k in keys])
            told, pairs = counts @ parts
            drawn[name][1].append(told / pairs)

    def interval(x):
        return pytest.approx(np.percentile(x, [2.5, 97.5]).tolist(), abs=1e-9)

    for name in values:
        found = verdict["critics"][name]
        assert found["auc_interval"] == interval(drawn[name][0])
        assert found["auc_within_group_interval"] == interval(drawn[name][1])
    pair = verdict["differences"]["a - b"]["auc_within_group"]
    assert pair["interval"] == interval(np.subtract(drawn["a"][1], drawn["b"][1]))
    a, b = (verdict["critics"][name]["auc_within_group"] for name in "ab")
    assert pair["difference"] == a - b


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, np.nan]), st.booleans(), st.integers(0, 3)), max_size=30))
def test_pairs_within_groups_equal_a_loop(rows):
    scores = np.array([row[0] for row in rows], dtype=np.float32)
    right = np.array([row[1] for row in rows], dtype=bool)
    group = np.array([row[2] for row in rows], dtype=np.int64)
    told, pairs = pairs_within(scores, right, group, 4)
    known = [None if np.isnan(x) else x for x in scores.tolist()]
    for k in range(4):
        alone = [k if g == k else -1 - i for i, g in enumerate(group.tolist())]
        assert (told[k], pairs[k]) == all_pairs(known, right, alone)


@pytest.mark.timeout(300)
def test_one_large_group_is_sorted_not_paired():
    """Its 10^10 pairs would take more memory than there is, or hours."""
    rng = np.random.default_rng(0)
    scores, right = rng.normal(size=200_000).astype(np.float32), rng.random(200_000) < 0.5
    group = np.zeros(len(scores), dtype=np.int64)
    told, pairs = pairs_within(scores, right, group, 1)
    overall = PairsOverall(scores, right, group).auc(np.ones((1, 1), dtype=np.int64))
    expected = roc_auc_score(right, scores)
    assert told[0] / pairs[0] == pytest.approx(expected, abs=1e-12)
    assert overall[0] == pytest.approx(expected, abs=1e-12)


def test_outcomes_are_right_or_wrong_only_where_there_are_two():
    assert correct_rollouts(np.array([1.0, -1.0, 1.0])).tolist() == [True, False, True]
    assert correct_rollouts(np.array([0.99999994, 0.0, 1.0, -6e-8])).tolist() == [True, False, True, False]
    assert correct_rollouts(np.array([0.0, 0.5, 1.0])) is None
    assert correct_rollouts(np.array([1.0, 1.0])) is None
    assert correct_rollouts(np.array([])) is None


def test_without_two_outcomes_there_is_no_auc(world):
    rollouts, values = world(4, flat=True)
    found = judged(rollouts, values)["critics"]["a"]
    assert (found["auc"], found["auc_within_group"], found["auc_interval"], found["auc_by_position"]) == (
        None,
        None,
        None,
        [],
    )


def test_by_a_column_each_value_has_its_own_right_and_wrong(world):
    rollouts, values, outcome = binary(world, 7, rollouts=90, groups=10)
    # Of task "sum" right is 2 and wrong -1; "word" is scored; "chat" is never wrong.
    last = np.array([np.flatnonzero(rollouts.response_mask[:stop])[-1] for stop in rollouts.offsets[1:]])
    task = rollouts.labels["task"]
    returns = rollouts.returns.copy()
    returns[last[task == "word"]] = np.random.default_rng(0).random((task == "word").sum())
    returns[last[task == "chat"]] = 2.0
    judge = Judge(["a"], resamples=RESAMPLES, by=["task"])
    judge.add(replace(rollouts, returns=returns), {"a": values["a"]})
    verdict = judge.verdict()
    by = verdict["critics"]["a"]["by"]["task"]
    assert verdict["critics"]["a"]["auc_within_group"] is None
    mine = np.flatnonzero(task == "sum")
    scores = np.array(mean_values(rollouts, values["a"]))
    told, pairs = all_pairs(scores[mine], outcome[mine], rollouts.group[mine])
    assert by["sum"]["auc_within_group"] == pytest.approx(told / pairs, abs=1e-9)
    assert (by["word"]["auc_within_group"], by["chat"]["auc_within_group"]) == (None, None)
    assert "auc_within_group" not in verdict["baselines"]["constant"]["by"]["task"]["sum"]


def test_a_constant_tells_nothing_apart(world):
    rollouts, values, _ = binary(world, 6)
    found = judged(rollouts, {"a": np.full_like(values["a"], 0.1)})["critics"]["a"]
    assert (found["auc"], found["auc_interval"]) == (0.5, [0.5, 0.5])
    assert (found["auc_within_group"], found["auc_within_group_interval"]) == (0.5, [0.5, 0.5])
    assert found["tells_apart_from"] is None


@pytest.mark.parametrize(
    ("lows", "start"),
    [
        ([0.4, 0.6, 0.6], 1 / 3),
        ([0.6, 0.4, 0.6], 2 / 3),
        ([0.6, 0.6, 0.5], None),
        ([0.6, 0.6, 0.6], 0.0),
        ([0.6, None, 0.6], 2 / 3),
    ],
)
def test_tells_apart_from_the_part_after_which_no_interval_reaches_one_half(lows, start):
    rows = [{"from": k / 3, "pairs": 5, "interval": None if low is None else [low, 0.9]} for k, low in enumerate(lows)]
    assert tells_apart_from(rows) == start


@pytest.mark.parametrize(
    ("tokens", "start"),
    [(1, 0.0), (6, 0.0), (9, 0.0), (10, 0.0), (20, 0.0)],
)
def test_responses_of_fewer_tokens_than_tenths_have_a_verdict(tokens, start):
    """Values that are right at every token: a tenth without a token says nothing."""
    right = np.tile([True, False, True, False], 20)
    rollouts = Rollouts(
        input_ids=np.zeros(80 * (tokens + 1), dtype=np.int32),
        offsets=np.arange(81, dtype=np.int64) * (tokens + 1),
        response_mask=np.tile(np.arange(tokens + 1) > 0, 80),
        returns=np.repeat(right, tokens + 1).astype(np.float32),
        values=None,
        group=np.arange(80) // 4,
        row=np.arange(80),
    )
    verdict = judged(rollouts, {"c": rollouts.returns * np.float32(0.5)})
    found = verdict["critics"]["c"]
    assert sum(row["pairs"] > 0 for row in found["auc_by_position"]) == min(tokens, 10)
    assert found["tells_apart_from"] == start
    assert any("from the first token on" in sentence for sentence in summary_text(verdict))


def test_a_part_without_a_pair_says_nothing_and_one_without_an_interval_ends_it():
    rows = [
        {"from": k / 5, "pairs": pairs, "interval": x}
        for k, (pairs, x) in enumerate([(3, [0.4, 0.9]), (3, [0.6, 0.9]), (0, None), (3, [0.6, 0.9]), (0, None)])
    ]
    assert tells_apart_from(rows) == 1 / 5
    rows[3]["interval"] = None
    assert tells_apart_from(rows) is None
