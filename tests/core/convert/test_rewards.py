"""Which field is the reward, and a number out of what it holds."""

import pytest

from critic_train.convert.field_values import kinds_of
from critic_train.convert.rewards import number_of, reward_fields, trl_reward, verl_reward
from critic_train.errors import DataError


def names(sample, find=reward_fields, **renames):
    reward = find([sample], kinds_of([sample]), renames)
    return None if reward is None else reward.names


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ({"score": 1, "reward": 2}, ("reward",)), ({"score": 1, "rm_score": 2}, ("score",)),
        ({"task_rewards": 1, "rewards": 2.0}, ("rewards",)),
        ({"overall_score": 1, "style_score": 2}, ("overall_score",)),
        ({"reward_model.score": 1, "x": 2}, ("reward_model.score",)),
        ({"reward.total": 1, "reward.a": 2}, ("reward.total",)),
        ({"is_correct": True}, ("is_correct",)), ({"correctness": 4}, None), ({"helpfulness": 3}, None),
        ({"score_count": 3, "reward_std": 1.0}, None), ({"score": "0.5"}, ("score",)),
        ({"reward": None, "acc": 1}, ("acc",)),
    ],
)  # fmt: skip
def test_the_reward_is_found_by_name_and_content(sample, expected):
    assert names(sample) == expected


@pytest.mark.parametrize(
    "sample", [{"a_score": 1, "b_score": 2}, {"reward.a": 1, "reward.b": 2}, {"is_correct": True, "passed": False}]
)
def test_several_rewards_are_refused_with_both_flags(sample):
    first, second = sample
    with pytest.raises(DataError, match="could each be the reward") as caught:
        names(sample)
    assert f"--column reward={first};" in caught.value.hint
    assert f"--column reward={first}+{second}" in caught.value.hint


def test_what_is_said_counts():
    sample = {"reward": 1, "a+b": 2, "c": 3, "d": 0.5}
    assert names(sample, reward="c") == ("c",)
    assert names(sample, reward="a+b") == ("a+b",)
    reward = reward_fields([sample], kinds_of([sample]), {"reward": "c+d"})
    assert reward is not None
    assert reward.of(sample) == 3.5


def test_verl_and_trl():
    assert names({"score": 1, "reward": 2}, verl_reward) == ("score",)
    table = {"step": 1, "advantage": 0.5, "f": 1.0, "g": 2.0}
    assert names(table, trl_reward) == ("f", "g")
    assert names({**table, "response_length": 37}, trl_reward) == ("f", "g")
    assert names({"step": 1, "a_reward": 1.0, "b_reward": 2.0, "prompt_tokens": 9}, trl_reward) == (
        "a_reward",
        "b_reward",
    )
    with pytest.raises(DataError, match="`f` may be of a reward function or not, beside `a_reward`"):
        names({"step": 1, "a_reward": 1.0, "f": 2.0}, trl_reward)


def test_numbers():
    assert [number_of(v) for v in (True, 1, "0.5", " True ", "incorrect", [2])] == [1, 1, 0.5, 1, 0, 2]
    assert number_of([0.5, 1]) == [0.5, 1]
    for odd in (None, "good", {"a": 1}, ["a"], []):
        with pytest.raises(ValueError):
            number_of(odd)
