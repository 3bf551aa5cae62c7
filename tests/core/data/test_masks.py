"""Several masks, labels, turns, and padding that nothing tells of."""

from typing import Any

import numpy as np
import pytest

from critic_train.data.masks import turn_ends
from critic_train.errors import DataError

IDS = [[5, 6, 7, 8, 9], [1, 2, 3]]
WIDE, NARROW = [[0, 0, 1, 1, 1], [0, 1, 1]], [[0, 0, 1, 0, 1], [0, 1, 1]]
PLAIN = {"reward": [1.0, 0.0], "returns": [[1.0] * 5, [0.0] * 3], "values": [[0.0] * 5, [0.0] * 3]}


def masks_of(shards: Any, **columns: Any) -> list[list[bool]]:
    batch = shards.read({"input_ids": IDS, **PLAIN, **columns})
    return [part.tolist() for part in np.split(batch.response_mask, batch.offsets[1:-1])]


@pytest.mark.parametrize(("first", "second"), [("response_mask", "loss_mask"), ("loss_mask", "info_mask")])
def test_the_narrowest_is_taken_whatever_its_name_and_that_is_said(shards: Any, first: str, second: str) -> None:
    expected = [[bool(one) for one in row] for row in NARROW]
    assert masks_of(shards, **{first: WIDE, second: NARROW}) == expected
    assert masks_of(shards, **{first: NARROW, second: WIDE}) == expected
    shards.write({"input_ids": IDS, **PLAIN, first: WIDE, second: NARROW})
    reader = shards.reader()
    list(reader)
    assert f"`{second}` is read as response_mask: it is narrower than `{first}`" in reader.notices


def test_equal_masks_are_said_to_be(shards: Any) -> None:
    shards.write({"input_ids": IDS, **PLAIN, "response_mask": NARROW, "loss_mask": NARROW})
    reader = shards.reader()
    list(reader)
    assert "`response_mask` is read as response_mask: it marks the same tokens as `loss_mask`" in reader.notices


def test_masks_that_do_not_lie_in_one_another_are_refused(shards: Any) -> None:
    columns = {"response_mask": [[0, 0, 0, 1, 1], [0, 1, 1]], "loss_mask": [[0, 0, 1, 1, 0], [0, 1, 1]]}
    with pytest.raises(DataError, match="`response_mask` and `loss_mask` mark different tokens") as caught:
        masks_of(shards, **columns)
    assert "--column response_mask=response_mask" in caught.value.hint
    shards.write({"input_ids": IDS, **PLAIN, **columns})
    (batch,) = shards.reader(renames={"response_mask": "loss_mask"})
    assert batch.response_mask.tolist() == [False, False, True, True, False, False, True, True]


def test_a_mask_that_fits_no_row_is_left_out(shards: Any) -> None:
    assert masks_of(shards, response_mask=NARROW, loss_mask=[[1] * 9, [1] * 9])[0] == [False, False, True, False, True]


@pytest.mark.parametrize("is_shifted", [False, True])
def test_labels_are_a_mask(shards: Any, is_shifted: bool) -> None:
    labels = [[-100, -100, 7, -100, 9], [-100, 2, 3]]
    labels = [[*row[1:], -100] for row in labels] if is_shifted else labels
    assert masks_of(shards, labels=labels) == [[False, False, True, False, True], [False, True, True]]


def test_labels_of_other_tokens_are_bad_rows(shards: Any) -> None:
    with pytest.raises(DataError, match="labels of other tokens"):
        masks_of(shards, labels=[[-100, -100, 70, 80, 90], [-100, 2, 3]])


def test_ends_of_turns() -> None:
    mask = np.asarray([0, 1, 1, 0, 1, 1, 0, 1], dtype=bool)
    ends, counts = turn_ends(mask, np.asarray([5, 3]))
    assert ends.tolist() == [2, 4, 5, 7]
    assert counts.tolist() == [2, 2]


def padded(left: bool, mask: bool) -> dict[str, Any]:
    """Three rollouts of unequal length, padded to 10 with token 0."""
    lengths = (4, 7, 10)
    ids = [list(range(5, 5 + n)) for n in lengths]
    ones = [[0, 0] + [1] * (n - 2) for n in lengths]
    pad = [[0] * (10 - n) for n in lengths]
    ids = [p + row if left else row + p for p, row in zip(pad, ids, strict=True)]
    ones = [p + row if left else row + p for p, row in zip(pad, ones, strict=True)]
    numbers = [[0.0] * 10 for _ in lengths]
    return {
        "input_ids": ids,
        "response_mask": ones if mask else [[0] + [1] * 9] * 3,
        "returns": numbers,
        "values": numbers,
    }


def test_padding_behind_the_mask_is_cut_and_said(shards: Any) -> None:
    shards.write(padded(left=False, mask=True))
    reader = shards.reader()
    (batch,) = reader
    assert batch.lengths.tolist() == [4, 7, 10]
    assert any("are padding and are cut" in sentence for sentence in reader.notices)


@pytest.mark.parametrize(("left", "mask"), [(True, True), (False, False)])
def test_padding_elsewhere_makes_bad_rows(shards: Any, left: bool, mask: bool) -> None:
    with pytest.raises(DataError, match=r"2 rows cannot be used .*padding") as caught:
        shards.read(padded(left=left, mask=mask))
    assert "expected an attention_mask, 0 on padding" in caught.value.message
