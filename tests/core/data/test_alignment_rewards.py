"""Rewards and cut rollouts as they come out of shards: under which token each stands, and which rows are bad."""

import numpy as np
import pyarrow as pa
import pytest

from critic_train.data.schema import Needs
from critic_train.data.writing import numpy_dtype
from critic_train.errors import DataError

FROM_REWARDS = Needs(returns=False, values=False, rewards="yes")


@pytest.fixture
def rewarded(good):
    """The three sound rollouts with a reward a rollout in place of returns and values."""
    del good["returns"], good["values"]
    return good | {"reward": [1.0, 0.5, -2.0]}


def rewards(rollouts):
    bounds = zip(rollouts.offsets[:-1].tolist(), rollouts.offsets[1:].tolist(), strict=True)
    return [rollouts.rewards[a:b].tolist() for a, b in bounds]


def test_a_reward_a_rollout_stands_on_the_last_response_token(shards, rewarded):
    rewarded["response_mask"][2] = [0, 0, 1, 1, 0]
    read = shards.read(rewarded, needs=FROM_REWARDS)
    assert rewards(read) == [[0, 0, 0, 1], [0, 0.5, 0], [0, 0, 0, -2, 0]]
    assert read.values is None
    assert read.returns.tolist() == [0.0] * 12


@pytest.mark.parametrize("name", ["rewards", "score", "reward_score"])
@pytest.mark.parametrize("kind", [pa.int64(), pa.bool_(), pa.float16(), pa.float64()])
def test_a_reward_under_other_names_and_types(shards, rewarded, name, kind):
    rewarded[name] = pa.array(np.asarray([1, 0, 1], dtype=numpy_dtype(kind)), type=kind)
    del rewarded["reward"]
    read = shards.read(rewarded, needs=FROM_REWARDS)
    assert rewards(read) == [[0, 0, 0, 1], [0, 0, 0], [0, 0, 0, 0, 1]]
    reader = shards.reader(needs=FROM_REWARDS)
    list(reader)
    assert f"`{name}` is read as reward" in reader.notices


def test_rewards_of_tokens_win_over_a_reward_a_rollout(shards, rewarded):
    rewarded["token_level_rewards"] = [[0.5, 1.0], [2.0], [3.0, 0.0, 4.0]]
    rewarded["response_mask"] = [[1, 1], [1], [1, 0, 1]]
    rewarded["input_ids"][1] = [9, 10]
    read = shards.read(rewarded, needs=FROM_REWARDS)
    assert rewards(read) == [[0, 0, 0.5, 1], [0, 2], [0, 0, 3, 0, 4]]
    renamed = shards.read(needs=FROM_REWARDS, renames={"reward": "reward"})
    assert rewards(renamed) == [[0, 0, 0, 1], [0, 0.5], [0, 0, 0, 0, -2]]


def test_a_reward_under_an_observation_belongs_to_the_choice_before_it(shards, rewarded):
    nan = float("nan")
    rewarded["input_ids"][0] = [1, 2, 3, 4, 5, 6, 7, 8]
    rewarded["response_mask"][0] = [0, 0, 1, 0, 0, 1, 0, 0]
    # On the prompt: earned by nobody. Two observation tokens behind each choice.
    rewarded["rewards"] = [[9, 9, 0.25, 1, 0, 0, nan, 2], [0, 0.5, 0], [0, 0, 3, 0, 4]]
    read = shards.read(rewarded, needs=FROM_REWARDS)
    assert rewards(read) == [[0, 0, 1.25, 0, 0, 2, 0, 0], [0, 0.5, 0], [0, 0, 3, 0, 4]]
    reader = shards.reader(needs=FROM_REWARDS)
    list(reader)
    assert any("stand on observation tokens" in notice for notice in reader.notices)


def test_a_reward_on_padding_is_nobodys(shards, rewarded):
    rewarded["attention_mask"] = [[1, 1, 1, 0], [1, 1, 1], [1, 1, 1, 1, 1]]
    rewarded["response_mask"][0] = [0, 0, 1, 0]
    rewarded["rewards"] = [[0, 0, 1, 7], [0, 0.5, 0], [0, 0, 3, 0, 4]]
    assert rewards(shards.read(rewarded, needs=FROM_REWARDS))[0] == [0, 0, 1]


@pytest.mark.parametrize(
    ("name", "rows", "found"),
    [
        ("reward", [1.0, None, 0.0], "column reward: found null, expected a number"),
        ("reward", [1.0, float("inf"), 0.0], "column reward: found inf on a response token"),
        ("rewards", [[0, 0, 1, 1], [0, None, 0], [0, 0, 1, 0, 1]], "column rewards: found null"),
        ("rewards", [[0, 0, 1, 1], [0, 1], [0, 0, 1, 0, 1]], None),
        ("rewards", [[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0, 1]], "column rewards: found 4 elements beside 3 tokens"),
        ("rewards", [[0, 0, 1, 1], [0, float("nan"), 0], [0, 0, 1, 0, 1]], "column rewards: found nan on a response"),
    ],
)
def test_rewards_that_cannot_be_used(shards, rewarded, name, rows, found):
    rewarded[name] = rows
    if found is None:
        shards.read(rewarded, needs=FROM_REWARDS)  # as long as the response
        return
    with pytest.raises(DataError, match="1 row cannot be used") as refused:
        shards.read(rewarded, needs=FROM_REWARDS)
    assert f"row 1, {found}" in refused.value.message
    # Where they are only looked for, there are none then, and the rows are good.
    shards.write(rewarded)
    where_there = Needs(returns=False, values=False, rewards="where there")
    assert shards.read(needs=where_there).rewards is None


def test_shards_without_rewards(shards, good):
    with pytest.raises(DataError, match="rewards: what each response token earned; or reward, one number a rollout"):
        shards.read(good, needs=FROM_REWARDS)
    assert shards.read(needs=Needs(rewards="where there")).rewards is None


def test_two_that_could_be_the_reward(shards, rewarded):
    rewarded["score"] = rewarded["rewards"] = rewarded.pop("reward")
    with pytest.raises(DataError, match="rewards and score could each be reward"):
        shards.read(rewarded, needs=FROM_REWARDS)
    assert shards.read(needs=Needs(returns=False, values=False, rewards="where there")).rewards is None


def test_files_of_which_some_have_rewards(shards, rewarded):
    shards.write(rewarded)
    shards.write({name: rows for name, rows in rewarded.items() if name != "reward"}, "b.parquet")
    reader = shards.reader(needs=Needs(returns=False, values=False, rewards="where there"))
    assert [batch.rewards for batch in reader] == [None, None]
    assert "1 of 2 files have no rewards" in " ".join(reader.notices)


@pytest.mark.parametrize("cut", [[True, False, True], [1, 0, 1]])
def test_cut_rollouts(shards, good, cut):
    good["is_truncated"] = cut
    read = shards.read(good, needs=Needs(truncated=True))
    assert read.truncated.tolist() == [True, False, True]
    assert shards.read().truncated is None


def test_cut_rollouts_left_out_make_no_bad_rows(shards, good):
    good["truncated"] = [True, False, False]
    good["returns"][0] = None
    good["response_mask"][0] = [0, 0, 0, 0]
    shards.write(good)
    reader = shards.reader(needs=Needs(truncated=True), drop_truncated=True)
    batches = list(reader)
    assert [batch.row.tolist() for batch in batches] == [[1, 2]]
    assert (reader.truncated_left_out, reader.bad_rows.count) == (1, 0)


def test_what_is_wrong_with_the_truncated_column(shards, good):
    with pytest.raises(DataError, match="truncated: whether each rollout was cut"):
        shards.read(good, needs=Needs(truncated=True))
    good["truncated"] = [True, None, False]
    with pytest.raises(DataError, match="row 1, column truncated: found null"):
        shards.read(good, needs=Needs(truncated=True))
    good["truncated"] = [0, 0, 2]
    with pytest.raises(DataError, match="row 2, column truncated: found 2, expected true or false"):
        shards.read(good, needs=Needs(truncated=True))
    good["truncated"] = [True, True, True]
    with pytest.raises(DataError, match="all 3 rollouts were cut"):
        shards.read(good, needs=Needs(truncated=True), drop_truncated=True)
