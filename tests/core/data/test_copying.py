"""Copies of shards keep names, row groups and what is not changed; the output folder records what began it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import StopAfter

from critic_train.data import copying
from critic_train.data.copying import OutputDirectory, copy_shard, schema_of, target_paths
from critic_train.data.shards import Shard, find_shards
from critic_train.errors import ConfigError, MachineError
from critic_train.stopping import Stopped, StopRequest

ROWS = 10


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """Ten rows in row groups of four, four and two."""
    table = pa.table({"uid": [f"u{i}" for i in range(ROWS)], "ids": [[i] * (i + 1) for i in range(ROWS)]})
    (tmp_path / "data/sub").mkdir(parents=True)
    pq.write_table(table, tmp_path / "data/sub/a.parquet", row_group_size=4)
    return find_shards([str(tmp_path / "data")])[0]


def unchanged(first: int, rows: pa.RecordBatch) -> pa.RecordBatch:
    return rows


def sizes(path: Path) -> list[int]:
    metadata = pq.ParquetFile(path).metadata
    return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


def test_an_unchanged_copy_has_the_rows_and_row_groups_of_its_original(shard: Shard, tmp_path: Path) -> None:
    read = list(copy_shard(shard, tmp_path / "copy.parquet", schema_of(shard), unchanged, StopRequest()))
    assert pq.read_table(tmp_path / "copy.parquet").equals(pq.read_table(shard.path))
    assert sizes(tmp_path / "copy.parquet") == [4, 4, 2]
    assert read == sorted(read)
    assert read[-1] == ROWS


def test_a_change_gets_the_first_row_of_its_piece_and_may_drop_rows(shard: Shard, tmp_path: Path) -> None:
    first_rows = []

    def odd_rows(first: int, rows: pa.RecordBatch) -> pa.RecordBatch:
        first_rows.append(first)
        return rows.filter(pa.array([(first + i) % 2 == 1 for i in range(rows.num_rows)]))

    list(copy_shard(shard, tmp_path / "copy.parquet", schema_of(shard), odd_rows, StopRequest()))
    assert pq.read_table(tmp_path / "copy.parquet")["uid"].to_pylist() == ["u1", "u3", "u5", "u7", "u9"]
    assert first_rows[0] == 0
    assert set(first_rows) >= {0, 4, 8}


def test_heavy_row_groups_are_split_and_stay_in_order(shard: Shard, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(copying, "ROW_GROUP_BYTES", 0)
    monkeypatch.setattr("critic_train.data.decoding.BATCH_BYTES", 1)
    list(copy_shard(shard, tmp_path / "copy.parquet", schema_of(shard), unchanged, StopRequest()))
    assert pq.read_table(tmp_path / "copy.parquet").equals(pq.read_table(shard.path))
    assert len(sizes(tmp_path / "copy.parquet")) > 3


def test_a_stop_leaves_no_file(shard: Shard, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        list(copy_shard(shard, tmp_path / "copy.parquet", schema_of(shard), unchanged, StopAfter(looks=1)))
    assert list(tmp_path.glob("*copy*")) == []


def test_an_error_in_a_change_leaves_no_file(shard: Shard, tmp_path: Path) -> None:
    def fails(first: int, rows: pa.RecordBatch) -> pa.RecordBatch:
        if first >= 4:
            raise ZeroDivisionError
        return rows

    with pytest.raises(ZeroDivisionError):
        list(copy_shard(shard, tmp_path / "copy.parquet", schema_of(shard), fails, StopRequest()))
    assert list(tmp_path.glob("*copy*")) == []


def test_targets_keep_the_tree_below_the_folder_that_all_shards_share(tmp_path: Path) -> None:
    for name in ("data/a/x.parquet", "data/b/x.parquet"):
        (tmp_path / name).parent.mkdir(parents=True)
        pq.write_table(pa.table({"uid": [name]}), tmp_path / name)
    shards = find_shards([str(tmp_path / "data")])
    targets = target_paths(shards, [str(tmp_path / "data")], tmp_path / "out")
    assert sorted(targets.values()) == [tmp_path / "out/a/x.parquet", tmp_path / "out/b/x.parquet"]


@pytest.mark.parametrize(
    ("out", "message"), [("data/out", "would then read its own output"), ("data/sub", "would then read its own output")]
)
def test_an_output_inside_a_source_is_refused(shard: Shard, tmp_path: Path, out: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        target_paths([shard], [str(tmp_path / "data")], tmp_path / out)


def test_a_source_is_not_replaced(shard: Shard, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="would be overwritten"):
        target_paths([shard], [shard.path], tmp_path / "data/sub")


def test_an_output_goes_on_with_the_settings_it_was_begun_with(tmp_path: Path) -> None:
    record = {"settings": {"model": "a"}}
    with OutputDirectory(tmp_path / "out", "predict", {}) as output:
        assert output.compare(record) == []
        assert (tmp_path / "out/_predict.json").is_file()
        with pytest.raises(MachineError), OutputDirectory(tmp_path / "out", "predict", {}):
            pass
        output.clear()
    with OutputDirectory(tmp_path / "out", "predict", {}) as output:
        assert output.compare(record) == []


def test_files_of_another_origin_are_not_written_over(tmp_path: Path) -> None:
    target = tmp_path / "out/a.parquet"
    target.parent.mkdir()
    target.write_bytes(b"somebody's")
    with (
        pytest.raises(ConfigError, match=r"holds other data: a\.parquet"),
        OutputDirectory(tmp_path / "out", "split", {}),
    ):
        pass
    assert [path.read_bytes() for path in target.parent.iterdir()] == [b"somebody's"]


def test_logs_and_notes_beside_an_output_are_no_data(tmp_path: Path) -> None:
    for name in ("slurm-17.out", "notes.md", ".git/objects/a.parquet", "_old/b.parquet"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("x")
    with OutputDirectory(tmp_path / "out", "split", {}) as output:
        assert output.compare({"settings": {}}) == []
