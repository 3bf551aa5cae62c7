"""Which fields hold several samples; whole files are in test_formats_wild."""

import pytest

from critic_train.convert.field_values import PAIR, UnclearError
from critic_train.convert.readings import choose_reading
from critic_train.convert.text_records import TEXT

GOOD = {"prompt": "a b", "response": "c d", "reward": 1.0}


def test_a_record_that_is_a_sample():
    carriers, reading = choose_reading([GOOD], {}, TEXT)
    assert carriers == ()
    assert reading.parts == {"prompt": "prompt", "response": "response"}


def test_a_preference_with_scores_is_two_samples():
    record = {"prompt": "a b", "chosen": "c d", "rejected": "e f", "score_chosen": 1.0, "score_rejected": 0.5}
    assert choose_reading([record], {}, TEXT)[0] == PAIR
    carriers, reading = choose_reading([record], {"response": "chosen", "reward": "score_chosen"}, TEXT)
    assert carriers == ()
    assert reading.parts["response"] == "chosen"


def test_one_sample_and_several_are_refused_where_both_could_be():
    record = {**GOOD, "candidates": [{"response": "e f", "reward": 0.5}, {"response": "g h", "reward": 0.0}]}
    with pytest.raises(
        UnclearError, match=r"`response` and `candidates\.response` could each be what the policy wrote"
    ):
        choose_reading([record], {}, TEXT)
    carriers, reading = choose_reading(
        [record], {"response": "candidates.response", "reward": "candidates.reward"}, TEXT
    )
    assert carriers == ("candidates",)
    assert reading.response == "candidates.response"


@pytest.mark.parametrize("pair", [{"rewards": "none"}, {"reward": "reward+none"}, {"response": "none"}])
def test_a_rename_of_nothing_is_refused(pair):
    with pytest.raises(UnclearError, match="there is no field 'none'"):
        choose_reading([GOOD], pair, TEXT)


def test_a_rename_without_effect_is_refused():
    with pytest.raises(UnclearError, match="--column returns=reward has no effect: this is read as text"):
        choose_reading([GOOD], {"returns": "reward"}, TEXT)
