"""Which fields hold token ids."""

import pytest

from critic_train.convert.field_values import UnclearError, kinds_of
from critic_train.convert.token_fields import token_parts

IDS, MORE, MASK = [5, 6], [5, 6, 7], [0, 1]


def parts(sample, **renames):
    return token_parts(kinds_of([sample]), [sample], renames)


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ({"input_ids": IDS, "mask": MASK}, {"input_ids": "input_ids"}),
        ({"token_ids": IDS, "loss_mask": MASK, "position_ids": MASK}, {"input_ids": "token_ids"}),
        ({"input_tokens": IDS, "output_tokens": IDS}, {"prompts": "input_tokens", "responses": "output_tokens"}),
        ({"p.prompt_ids": IDS, "p.response_ids": IDS}, {"prompts": "p.prompt_ids", "responses": "p.response_ids"}),
        ({"prompt_ids": IDS, "choices.token_ids": IDS}, {"prompts": "prompt_ids", "responses": "choices.token_ids"}),
        ({"input_ids": IDS, "output_ids": [8]}, {"prompts": "input_ids", "responses": "output_ids"}),
        ({"input_ids": IDS, "output_ids": MORE}, None),
        ({"tokens": IDS, "response_length": 1}, {"input_ids": "tokens", "response_length": "response_length"}),
        ({"tokens": IDS}, None),
        ({"prompt_ids": IDS}, None),
        ({"prompts": "text", "responses": "text"}, None),
    ],
)  # fmt: skip
def test_parts(sample, expected):
    assert parts(sample) == expected


def test_what_is_said_counts_and_two_are_refused():
    sample = {"a": IDS, "b": IDS, "mask": MASK}
    assert parts(sample, input_ids="a") == {"input_ids": "a"}
    assert parts(sample, prompts="a", responses="b") == {"prompts": "a", "responses": "b"}
    with pytest.raises(UnclearError, match="`output_ids` and `generated_ids` could each be responses") as caught:
        parts({"prompt_ids": IDS, "output_ids": IDS, "generated_ids": MORE})
    assert caught.value.hint == "say which: --column responses=output_ids"
