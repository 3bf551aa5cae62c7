"""Shards as they are written: encodings, row groups, prompt groups, and nothing half-written."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from critic_train.data.writing import ShardFile, ShardWriter, rollout_table

KINDS = {"uid": pa.string(), "step": pa.int64(), "ids": pa.list_(pa.int32()), "returns": pa.list_(pa.float32())}
SCHEMA = pa.schema(KINDS)


def rows(uids: list[str | None], tokens: int = 4, start: int = 0) -> pa.Table:
    ids = [[start + i] * tokens for i in range(len(uids))]
    numbers = [[float(v) for v in row] for row in ids]
    columns = {"uid": uids, "step": [start + i for i in range(len(uids))], "ids": ids, "returns": numbers}
    return pa.table(columns, schema=SCHEMA)


def read(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("*.parquet"))])


def row_groups(folder: Path) -> list[list[list[str | None]]]:
    """The uids of each row group of each shard."""
    files = [pq.ParquetFile(path) for path in sorted(folder.glob("*.parquet"))]
    return [[f.read_row_group(g).column("uid").to_pylist() for g in range(f.num_row_groups)] for f in files]


def test_encodings_compression_and_checksums(tmp_path):
    with ShardFile(tmp_path / "a.parquet", SCHEMA) as file:
        file.write_row_group(rows(["a", "a", "b"]))
    footer = pq.read_metadata(tmp_path / "a.parquet").row_group(0)
    columns = {footer.column(i).path_in_schema: footer.column(i) for i in range(4)}
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    encodings = {name.split(".")[0]: set(column.encodings) - {"RLE"} for name, column in columns.items()}
    assert encodings["returns"] == {"BYTE_STREAM_SPLIT"}
    assert "RLE_DICTIONARY" in encodings["uid"] & encodings["step"]
    assert encodings["ids"] == {"PLAIN"}


def test_a_flipped_bit_is_noticed_by_the_checksum(tmp_path):
    path = tmp_path / "a.parquet"
    with ShardFile(path, SCHEMA) as file:
        file.write_row_group(rows(["a"] * 500, tokens=50))
    column = pq.read_metadata(path).row_group(0).column(3)
    damaged = bytearray(path.read_bytes())
    damaged[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile(path, page_checksum_verification=True).read()


def test_row_groups_are_the_callers_and_none_is_empty(tmp_path):
    with ShardFile(tmp_path / "a.parquet", SCHEMA) as file:
        for count in (3, 0, 5, 1):
            file.write_row_group(rows(["a"] * count))
    assert [len(group) for group in row_groups(tmp_path)[0]] == [3, 5, 1]


def test_nothing_stands_after_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"what stood before")

    def fail() -> None:
        with ShardFile(path, SCHEMA) as file:
            file.write_row_group(rows(["a"]))
            assert path.read_bytes() == b"what stood before"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [found.name for found in tmp_path.iterdir()] == ["a.parquet"]
    assert path.read_bytes() == b"what stood before"


def test_full_shards_stand_and_an_unfinished_one_does_not(tmp_path):
    writer = ShardWriter(tmp_path, SCHEMA, row_group_bytes=200, shard_bytes=400)

    def fail() -> None:
        with writer:
            for start in range(39):
                writer.write(rows([str(start)], start=start))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert writer.files
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in writer.files]
    assert read(tmp_path).num_rows < 39


def test_prompt_groups_are_not_cut_apart(tmp_path):
    uids = [name for name in "abcdefgh" for _ in range(5)]
    with ShardWriter(tmp_path, SCHEMA, keep_together="uid", row_group_bytes=400, shard_bytes=1000) as writer:
        for start in range(0, 40, 3):
            writer.write(rows(uids[start : start + 3], start=start))
    groups = row_groups(tmp_path)
    assert len(groups) > 1
    assert all(len(group) == 5 * len(set(group)) for shard in groups for group in shard)
    assert read(tmp_path).equals(rows(uids))


def test_a_group_too_large_to_hold_is_cut(tmp_path):
    with ShardWriter(tmp_path, SCHEMA, keep_together="uid", row_group_bytes=1000) as writer:
        for start in range(300):
            writer.write(rows(["same"], start=start))
    assert max(len(group) for shard in row_groups(tmp_path) for group in shard) < 100
    assert read(tmp_path).equals(rows(["same"] * 300))


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.integers(1, 4)), max_size=12),
    st.integers(1, 9),
    st.integers(50, 800),
)
def test_any_stream_comes_back_in_order(tmp_path_factory, runs, at_once, limit):
    folder = tmp_path_factory.mktemp("stream")
    uids = [uid for uid, count in runs for _ in range(count)]
    whole = rows(uids)
    with ShardWriter(folder, SCHEMA, keep_together="uid", row_group_bytes=limit, shard_bytes=3 * limit) as writer:
        for start in range(0, len(uids), at_once):
            writer.write(whole.slice(start, at_once))
    assert writer.rows == len(uids)
    if uids:
        assert read(folder).equals(whole)
        names = [path.name for path in writer.files]
        assert names == [f"part-{i:05d}.parquet" for i in range(len(names))]
        assert all(re.fullmatch(r"part-\d{5}\.parquet", path.name) for path in folder.iterdir())


def test_ragged_columns_become_lists_of_the_canonical_types():
    table = rollout_table(
        np.asarray([0, 2, 2, 5]),
        {
            "input_ids": np.asarray([1, 2, 3, 4, 5]),
            "response_mask": np.asarray([0, 1, 0, 1, 1]),
            "returns": np.linspace(0, 1, 5),
        },
        {"uid": ["a", "b", "c"], "reward": np.asarray([1, 0, 1]), "step": [1, None, 3]},
    )
    assert table.schema.field("input_ids").type == pa.list_(pa.int32())
    assert table.column("input_ids").to_pylist() == [[1, 2], [], [3, 4, 5]]
    assert table.column("response_mask").to_pylist() == [[False, True], [], [False, True, True]]
    assert table.column("returns").to_pylist() == [[0.0, 0.25], [], [0.5, 0.75, 1.0]]
    assert table.schema.field("reward").type == pa.float64()
    assert table.column("step").to_pylist() == [1, None, 3]


def test_a_column_of_another_length_is_refused():
    with pytest.raises(ValueError, match="returns: 1 entries for 2 tokens"):
        rollout_table(np.asarray([0, 2]), {"returns": np.asarray([0.0])})
    with pytest.raises(ValueError, match="uid: 2 entries for 1 rollouts"):
        rollout_table(np.asarray([0, 2]), {}, {"uid": ["a", "b"]})
