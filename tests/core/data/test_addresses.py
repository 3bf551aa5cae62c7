"""The uid of a row, found again."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from critic_train.data.addresses import UidLookup
from critic_train.data.reading import Needs, RolloutReader
from critic_train.data.shards import find_shards


@pytest.fixture
def folder(tmp_path):
    """Three shards of three row groups, the middle one with numbers for uids and the last without any."""
    uids = (
        pa.array([f"prompt {k}" for k in range(8)]),
        pa.array([100 + k if k != 2 else None for k in range(8)]),
        None,
    )
    for number, column in enumerate(uids):
        columns = {"input_ids": [[1, 2]] * 8, "response_mask": [[0, 1]] * 8, "returns": [[0.0, 1.0]] * 8}
        table = pa.table(columns | ({} if column is None else {"uid": column}))
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=3)
    pq.write_table(table.slice(0, 0), tmp_path / "05-empty.parquet")
    return tmp_path


def test_rows_get_the_uids_that_stand_there(folder):
    shards = find_shards([str(folder)])
    lookup = UidLookup(shards, {})
    rows = [row for batch in RolloutReader(shards, needs=Needs(values=False)) for row in batch.row.tolist()]
    assert rows == list(range(24))
    expected = [f"prompt {k}" for k in range(8)] + [None if k == 2 else str(100 + k) for k in range(8)] + [None] * 8
    assert lookup(rows) == dict(enumerate(expected))
    assert lookup([9, 3]) == {3: "prompt 3", 9: "101"}
    assert lookup([]) == {}
    assert lookup([24]) == {24: None}


def test_renamed_columns_and_lost_files(folder):
    lookup = UidLookup(find_shards([str(folder)]), {"uid": "returns"})
    assert lookup([0]) == {0: None}  # it is no uid
    lookup = UidLookup(find_shards([str(folder)]), {})
    (folder / "0.parquet").unlink()
    assert lookup([1, 8]) == {1: None, 8: "100"}


def test_rows_of_files_that_were_left_out_are_not_counted(folder):
    shards = find_shards([str(folder)])
    (first,) = [shard.name for shard in shards if shard.name.endswith("0.parquet")]
    lookup = UidLookup(shards, {}, {first})
    assert lookup([0, 2]) == {0: "100", 2: None}
