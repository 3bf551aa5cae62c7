"""The folder of a conversion: what is removed, made again, or refused."""

import json

import pytest
from conftest import content, lines, run

from critic_train.errors import ConfigError, MachineError
from critic_train.run.lock import Lock


def test_what_a_killed_conversion_left_is_cleared_away(tmp_path, three):
    done = run(tmp_path / "shards", three)
    whole = content(done.to)
    record = json.loads((done.to / "_convert.json").read_text())
    record["sources"] = record["sources"][:1]
    (done.to / "_convert.json").write_text(json.dumps(record))
    (done.to / "part-00007-00000.parquet").write_bytes(b"half")
    (done.to / ".part-00001-00000.parquet.tmp-1").write_bytes(b"half")
    assert content(run(done.to, three).to) == whole
    assert not list(done.to.glob(".part*"))


def test_a_changed_source_is_converted_anew_and_a_new_one_is_added(tmp_path, three):
    run(tmp_path / "shards", three)
    lines(three / "2.jsonl", 8, start=500)
    lines(three / "11.jsonl", 4, start=900)
    done = run(tmp_path / "shards", three)
    assert done.result["rollouts"] == 20 + 8 + 20 + 4
    found = [row[2] for row in done.table.column("returns").to_pylist()]
    assert found == [*range(20), *range(500, 508), *range(40, 60), *range(900, 904)]


def test_a_shard_that_is_gone_is_made_again(tmp_path, three):
    done = run(tmp_path / "shards", three)
    whole = content(done.to)
    next(done.to.glob("*.parquet")).unlink()
    assert content(run(done.to, three).to) == whole


def test_a_folder_of_somebody_elses_is_refused(tmp_path, three):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ConfigError, match="did not make"):
        run(tmp_path / "notes", three)
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["a.txt"]
    with pytest.raises(ConfigError, match="is a file"):
        run(tmp_path / "notes" / "a.txt", three)


def test_other_settings_need_another_folder(tmp_path, three):
    run(tmp_path / "shards", three)
    with pytest.raises(ConfigError, match="--on-bad-rows was fail, is now skip"):
        run(tmp_path / "shards", three, on_bad_rows="skip")


def test_one_process_a_folder(tmp_path, three):
    run(tmp_path / "shards", three)
    with Lock(tmp_path / "shards" / ".lock"), pytest.raises(MachineError, match="in use"):
        run(tmp_path / "shards", three)


def test_the_record_beside_the_shards_is_no_shard(tmp_path, three):
    from critic_train.data.shards import find_shards

    done = run(tmp_path / "shards", three)
    assert len(find_shards([str(done.to)])) == 3
    assert not any(part.startswith("/") for part in done.result["columns"])
