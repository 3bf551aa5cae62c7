"""What fields hold, and records of several samples taken apart."""

import pytest

from critic_train.convert import field_values as values

TALK = [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, values.NOTHING), ([], values.NOTHING), ({}, values.NOTHING), (True, values.NUMBER), (0.5, values.NUMBER),
        ("", values.TEXT), ([1, 2], values.IDS), ([1, -100], values.IDS), ([1, -5], values.NUMBERS),
        ([0.5, 1], values.NUMBERS), ([True], values.NUMBERS), (TALK, values.MESSAGES), (["a"], values.SEVERAL),
        ([[1]], values.SEVERAL), ([TALK], values.SEVERAL), ([{"a": 1}], values.SEVERAL), (b"x", values.OTHER),
    ],
)  # fmt: skip
def test_kinds(value, kind):
    assert values.kind_of_value(value) == kind


def test_a_field_is_what_most_samples_have():
    samples = [{"a": 1, "b": [1], "c": None}, {"a": 2, "b": [0.5]}, {"a": "x", "b": None}]
    assert values.kinds_of(samples) == {"a": values.NUMBER, "b": values.NUMBERS, "c": values.NOTHING}


def test_nested_fields_have_dotted_names_and_written_conversations_are_read():
    record = {"a": {"b": {"c": 1}}, "d": [1], "e": "[{'role': 'user', 'content': 'x'}]", "f": "[{'role': broken"}
    assert values.flat(record) == {
        "a.b.c": 1, "d": [1], "e": [{"role": "user", "content": "x"}], "f": "[{'role': broken"
    }  # fmt: skip


def test_samples_take_their_entries_and_share_the_rest():
    record = {
        "prompt": "q", "ids": [7, 8], "outs": [{"text": "a"}, {"text": "b"}], "rewards": [1, 0], "flags": [True, False],
        "talk": TALK, "texts": ["x", "y", "z"],
    }  # fmt: skip
    first, second = values.samples_of(record, ("outs",))
    shared = {"prompt": "q", "ids": [7, 8], "talk": TALK, "texts": ["x", "y", "z"]}
    assert first == {**shared, "outs.text": "a", "rewards": 1, "flags": True}
    assert second == {**shared, "outs.text": "b", "rewards": 0, "flags": False}
    assert values.of_whole_record([record], ("outs",)) == set(shared)
    with pytest.raises(ValueError, match="`prompt` holds no list"):
        values.samples_of(record, ("prompt",))


def test_samples_of_samples():
    record = {"runs": [{"reward": 1, "steps": [{"ids": [1]}, {"ids": [2]}]}, {"reward": 0, "steps": [{"ids": [3]}]}]}
    samples = values.samples_of(record, ("runs", "runs.steps"))
    assert [(sample["runs.reward"], sample["runs.steps.ids"]) for sample in samples] == [(1, [1]), (1, [2]), (0, [3])]


def test_words_of_names():
    assert values.word_list("generatedSolutions") == ["generated", "solution"]
    assert values.word_list("task.prompt_ids") == ["task", "prompt", "id"]
    assert values.word_list("response2") == ["response"]
    assert values.word_list("class_loss") == ["class", "loss"]
