"""Reading to the end whatever is there, for those who only look."""

from pathlib import Path

import pytest
from support import StopAfter, readable_rollouts, write_shard

from critic_train.data.bad_input import BadFiles
from critic_train.data.scanning import full_reader, read_through
from critic_train.data.shards import find_shards
from critic_train.errors import DataError
from critic_train.stopping import Stopped, StopRequest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound shard and one whose footer is whole and whose pages are zeros."""
    write_shard(tmp_path / "a.parquet", readable_rollouts(4, seed=1))
    damaged = write_shard(tmp_path / "b.parquet", readable_rollouts(4, seed=2))
    content = damaged.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    damaged.write_bytes(content[:4] + bytes(len(content) - 4 - footer) + content[-footer:])
    return tmp_path


def test_a_damaged_file_is_passed_over_where_there_is_room_for_its_name(folder):
    bad, used = BadFiles(), []
    shards = find_shards([str(folder)])
    told = list(read_through(full_reader(shards, [], StopRequest(), bad), StopRequest(), used.append))
    assert sum(len(batch) for batch in used) == told[-1].done == 16
    assert told[-1].total == 32
    assert [file["file"] for file in bad.summary()["files"]] == [str(folder / "b.parquet")]
    with pytest.raises(DataError, match=r"b\.parquet"):
        list(read_through(full_reader(shards, [], StopRequest(), None), StopRequest()))


def test_nothing_is_used_after_it_was_asked_to_stop(folder):
    used = []
    reader = full_reader(find_shards([str(folder / "a.parquet")]), [], StopRequest(), None)
    with pytest.raises(Stopped):
        list(read_through(reader, StopAfter(looks=0), used.append))
    assert used == []
