"""Shards are read whole, in order, in bounded memory; what cannot be used is named."""

from typing import Any

import numpy as np
import pytest

from critic_train.errors import DataError


def test_reads_what_was_written(shards: Any, good: dict[str, Any], listed: Any) -> None:
    rollouts = shards.read(good)
    assert listed(rollouts) == {**good, "response_mask": [[bool(m) for m in row] for row in good["response_mask"]]}
    assert rollouts.row.tolist() == [0, 1, 2]
    kinds = (rollouts.input_ids, rollouts.response_mask, rollouts.returns, rollouts.values, rollouts.offsets)
    assert [c.dtype for c in kinds] == [np.int32, np.bool_, np.float32, np.float32, np.int64]


def test_every_iteration_starts_from_the_first_row(shards: Any, good: dict[str, Any]) -> None:
    shards.write(good)
    reader = shards.reader()
    assert [len(b) for b in reader] == [len(b) for b in reader] == [3]


def test_rows_are_numbered_over_files_and_row_groups(shards: Any, good: dict[str, Any]) -> None:
    shards.write(good, "b/0.parquet", row_group_size=2)
    shards.write(good, "a.parquet", row_group_size=1)
    rollouts = shards.read()
    assert rollouts.row.tolist() == [0, 1, 2, 3, 4, 5]
    assert rollouts.lengths.tolist() == [4, 3, 5] * 2


def test_zero_row_files_stand_beside_good_ones(shards: Any, good: dict[str, Any]) -> None:
    shards.write({name: [] for name in good}, "0.parquet")
    shards.write(good, "1.parquet")
    shards.write({"unrelated": []}, "2.parquet")
    assert len(shards.read()) == 3


def test_nothing_but_zero_row_files_is_an_error(shards: Any, good: dict[str, Any]) -> None:
    shards.write({name: [] for name in good})
    with pytest.raises(DataError, match="there is not one row in"):
        shards.reader()
