"""Which field of text is what; whole files are in test_formats_wild."""

import pytest

from critic_train.convert.field_values import UnclearError
from critic_train.convert.fields import read_fields

TALK = [{"role": "user", "content": "say p"}, {"role": "assistant", "content": "p is said"}]


def test_renames_come_before_names():
    sample = {"prompt": "a b", "response": "c d", "mine": "e f", "reward": 1}
    reading = read_fields([sample], {"response": "mine", "prompt": "response"})
    assert reading.parts == {"prompt": "response", "response": "mine"}
    assert reading.understood == {"prompt": "`response`", "response": "`mine`", "reward": "`reward`"}


def test_a_conversation_and_a_part_of_it_cannot_both_be_said():
    with pytest.raises(UnclearError, match="--column response=b has no effect beside --column messages=a"):
        read_fields([{"a": TALK, "b": "p", "reward": 1}], {"messages": "a", "response": "b"})


def test_a_response_of_messages_is_no_conversation():
    sample = {"prompt": TALK[:1], "completion": TALK[1:], "tools": [{"name": "f"}], "reward": 1}
    assert read_fields([sample], {}).parts == {"prompt": "prompt", "response": "completion", "tools": "tools"}


def test_equal_fields_are_one():
    sample = {"prompt": "a b", "response": "c d", "output": "c d", "reward": 1}
    assert read_fields([sample], {}).parts["response"] == "response"


def test_a_prompt_behind_a_template_is_read_as_it_is():
    sample = {"messages": TALK, "prompt": "<|user|>say p<|assistant|>", "response": "p is said", "reward": 1}
    assert read_fields([sample], {}).parts == {"prompt": "prompt", "response": "response"}
    assert read_fields([{**sample, "prompt": "say p"}], {}).parts == {"messages": "messages"}


def test_what_all_samples_of_a_record_share_is_no_response():
    sample = {"prompt": "a b", "response": "c d", "texts": "e f", "reward": 1}
    with pytest.raises(UnclearError, match="`texts` could be what the policy wrote"):
        read_fields([sample], {}, shared=frozenset({"prompt", "response"}))
