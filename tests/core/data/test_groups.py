"""Prompt groups: the uid where it is one, else the prompt."""

from typing import Any

import pytest

from critic_train.errors import DataError

PROMPTS = {"p": [1, 2], "q": [3, 4], "r": [5, 6]}


def rollouts(prompts: str, uids: list[Any] | None = None) -> dict[str, Any]:
    ids = [[*PROMPTS[prompt], 7, 8] for prompt in prompts]
    plain = {"input_ids": ids, "response_mask": [[0, 0, 1, 1]] * len(ids)}
    numbers = [[0.0] * 4 for _ in ids]
    return {**plain, "returns": numbers, "values": numbers, **({} if uids is None else {"uid": uids})}


def groups(shards: Any, **options: Any) -> tuple[list[int], list[str]]:
    """A number for each rollout's group, in the order of their first rollouts; and the notices."""
    reader = shards.reader(**options)
    keys = [key for batch in reader for key in batch.group.tolist()]
    return [list(dict.fromkeys(keys)).index(key) for key in keys], reader.notices


def test_a_uid_for_each_rollout_is_none(shards: Any) -> None:
    shards.write(rollouts("ppqq", ["a_0", "a_1", "b_0", "b_1"]))
    found, said = groups(shards)
    assert found == [0, 0, 1, 1]
    assert any("every rollout has a uid of its own, although prompts repeat" in sentence for sentence in said)
    assert groups(shards, group_by="uid")[0] == [0, 1, 2, 3]


def test_nothing_is_said_where_prompts_do_not_repeat(shards: Any) -> None:
    shards.write(rollouts("pq", ["a", "b"]))
    found, said = groups(shards)
    assert found == [0, 1]
    assert not any("uid" in sentence for sentence in said)


def test_a_uid_that_starts_anew_in_a_file_joins_nothing(shards: Any) -> None:
    shards.write(rollouts("ppqq", [0, 0, 1, 1]), "a.parquet")
    shards.write(rollouts("rrqq", [0, 0, 1, 1]), "b.parquet")
    found, said = groups(shards)
    assert found == [0, 0, 1, 1, 2, 2, 1, 1]
    assert any("uids start anew: 2 rollouts have a uid that an earlier file has" in sentence for sentence in said)
    assert groups(shards, group_by="uid")[0] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert groups(shards, group_by="prompt")[0] == [0, 0, 1, 1, 2, 2, 1, 1]


def test_a_group_of_several_prompts_in_one_file_stays_one(shards: Any) -> None:
    shards.write(rollouts("pqpq", ["a", "a", "b", "b"]))
    assert groups(shards)[0] == [0, 0, 1, 1]


def test_a_column_may_be_the_group(shards: Any) -> None:
    shards.write({**rollouts("ppqq", ["a", "a", "b", "b"]), "mine": [1, 2, 1, 2]})
    assert groups(shards, group_by="mine")[0] == [0, 1, 0, 1]


def test_a_uid_that_is_not_there_is_refused(shards: Any) -> None:
    shards.write(rollouts("pq"))
    with pytest.raises(DataError, match=r"--group-by uid: .*a\.parquet has no column uid"):
        groups(shards, group_by="uid")


def test_a_request_is_no_group(shards: Any) -> None:
    shards.write({**rollouts("ppqq"), "request_id": ["a", "b", "c", "d"]})
    assert groups(shards)[0] == [0, 0, 1, 1]
