"""Records as canonical tables: which column became what, and masks that may be shifted."""

import numpy as np
import pyarrow as pa
import pytest

from critic_train.convert.canonical import Canonicaliser
from critic_train.convert.raw_records import Records
from critic_train.errors import DataError


def records(**columns):
    batch = pa.record_batch({name: pa.array(entries) for name, entries in columns.items()})
    return Records(batch=batch, rows=np.arange(batch.num_rows))


def test_what_was_understood_is_told():
    made = Canonicaliser(name="a", renames={"reward": "mine"})
    made.table(records(tokens=[[1, 2, 3]], mask=[[0, 1, 1]], mine=[1.0], group_id=["x"]))
    made.finish()
    assert made.sentence() == (
        "a: prompt = `tokens` before the response, response = what the mask marks in `tokens`, reward = `mine`, "
        "mask = `mask`, group = `group_id`"
    )


def test_without_the_uid_a_group_is_the_prompt():
    made = Canonicaliser(name="a", renames={}, group_by="prompt")
    table = made.table(records(input_ids=[[1, 2]], response_mask=[[0, 1]], reward=[1.0], uid=["x"]))
    assert "uid" not in table.column_names
    assert made.understood["group"] == "the prompt"


SHIFTED = {
    "input_ids": [[5, 6, 4, 8, 2], [7, 4, 9, 9, 2]], "loss_mask": [[0, 0, 1, 1, 0], [0, 1, 1, 1, 0]],
    "reward": [1.0, 0.0],
}  # fmt: skip


def test_a_mask_over_the_tokens_that_predict_is_refused():
    made = Canonicaliser(name="a", renames={})
    made.table(records(**SHIFTED))
    with pytest.raises(DataError, match="`loss_mask` may be shifted by one: in every rollout it begins on token 4"):
        made.finish()


@pytest.mark.parametrize(
    ("changes", "renames"),
    [
        ({}, {"response_mask": "loss_mask"}),
        ({"input_ids": [[5, 6, 4, 8, 2], [7, 3, 9, 9, 2]]}, {}),
        ({"input_ids": [[5, 6, 4, 8, 2], [7, 4, 9, 9, 3]]}, {}),
        ({"loss_mask": [[0, 0, 1, 1, 0], [0, 1, 1, 1, 1]]}, {}),
    ],
)
def test_other_masks_are_not(changes, renames):
    made = Canonicaliser(name="a", renames=renames)
    made.table(records(**(SHIFTED | changes)))
    made.finish()
