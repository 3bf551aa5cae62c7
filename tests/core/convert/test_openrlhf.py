"""OpenRLHF's experiences: columns of actions pair with the last tokens, what has no entry a rollout is left out."""

import numpy as np
import pytest

from critic_train.convert.openrlhf import KIND, kind_of, records
from critic_train.errors import DataError


def experience(**changes):
    """Two rollouts of four tokens and three actions each."""
    fields = {
        "sequences": np.array([[1, 2, 3, 4], [5, 6, 7, 0]]),
        "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "action_mask": np.array([[0, 1, 1], [1, 1, 0]]),
        "values": np.array([[0.0, 0.1, 0.2], [0.3, 0.4, 0.0]], dtype=np.float32),
        "rewards": np.array([[1.0], [0.0]]),
        "truncated": np.array([0, 1]),
        "labels": ["a", "b"],
    }
    return {name: value for name, value in (fields | changes).items() if value is not None}


def read(*experiences, **more):
    return list(records({"experiences": list(experiences), **more}))


def test_it_is_known_by_its_fields():
    assert kind_of({"experiences": [experience()]}) == KIND
    for other in ({}, [], {"experiences": []}, {"experiences": [[]]}, {"experiences": [{"sequences": 1}]}):
        assert kind_of(other) is None


def test_columns_of_actions_pair_with_the_last_tokens():
    (first,) = read(experience())
    columns = first.batch.to_pydict()
    assert columns["input_ids"] == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert columns["response_mask"] == [[0, 0, 1, 1], [0, 1, 1, 0]]
    np.testing.assert_allclose(columns["values"], [[0, 0, 0.1, 0.2], [0, 0.3, 0.4, 0]], atol=1e-7)
    assert (columns["reward"], columns["truncated"], columns["label"]) == ([1.0, 0.0], [False, True], ["a", "b"])
    assert "returns" not in columns


def test_rows_are_counted_over_experiences_and_have_the_step():
    batches = read(experience(), experience(), step=7)
    assert [batch.rows.tolist() for batch in batches] == [[0, 1], [2, 3]]
    assert [batch.batch.column("step").to_pylist() for batch in batches] == [[7, 7]] * 2
    assert "step" not in read(experience(), step="7")[0].batch.schema.names


@pytest.mark.parametrize("labels", [["a"], [None, None], [["a"], ["b"]], "ab"])
def test_what_is_not_one_entry_a_rollout_is_left_out(labels):
    (first,) = read(experience(labels=labels))
    assert "label" not in first.batch.schema.names


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"action_mask": None, "sequences": None}, "experience 1 has no action_mask and sequences"),
        ({"attention_mask": np.ones(4)}, "experience 1 has no attention_mask"),
        ({"values": np.zeros((2, 4))}, r"experience 1: `values` is \(2, 4\), beside 2 x 4 tokens"),
        ({"values": np.zeros((1, 3))}, r"`values` is \(1, 3\)"),
        ({"action_mask": np.ones((2, 5)), "values": None}, r"`action_mask` is \(2, 5\)"),
    ],
)
def test_fields_that_are_missing_or_do_not_fit_are_named(changes, complaint):
    with pytest.raises(DataError, match=complaint):
        read(experience(), experience(**changes))
