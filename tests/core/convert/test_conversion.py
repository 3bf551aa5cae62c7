"""A conversion as a whole: what stands, what is refused, what goes on where it stopped."""

import os
import pickle

import pyarrow.parquet as pq
import pytest
from conftest import content, lines, run
from support import StopAfter

from critic_train.errors import DataError
from critic_train.events import Progress


def test_steps_come_in_their_order_and_nothing_is_done_twice(tmp_path, three):
    first = run(tmp_path / "shards", three)
    assert first.table.column("returns").to_pylist() == [[0, 1, i] for i in range(60)]
    assert first.ended.status == "finished"
    before = {path.name: path.stat().st_mtime_ns for path in first.to.glob("*.parquet")}
    again = run(tmp_path / "shards", three)
    assert again.ended.status == "already finished"
    assert {path.name: path.stat().st_mtime_ns for path in again.to.glob("*.parquet")} == before
    assert again.result == first.result


def test_a_stopped_conversion_goes_on_to_the_same_shards(tmp_path, three):
    whole = content(run(tmp_path / "whole", three).to)
    for looks in range(8):
        stopped = run(tmp_path / f"s{looks}", three, stop=StopAfter(looks=looks))
        assert stopped.ended.status in ("interrupted", "finished")
        assert {**whole, **content(stopped.to)} == whole
        assert content(run(stopped.to, three).to) == whole


def test_bad_rollouts_are_counted_over_all_sources_and_named(tmp_path, three):
    lines(three / "1.jsonl", 20, bad=(3, 4))
    lines(three / "10.jsonl", 20, start=40, bad=(0,))
    with pytest.raises(DataError, match="3 rows cannot be used") as caught:
        run(tmp_path / "shards", three)
    assert f"{three}/1.jsonl, record 3, column returns: found 5 elements beside 3 tokens" in caught.value.message
    done = run(tmp_path / "skipping", three, on_bad_rows="skip")
    assert done.result["rollouts"] == 57
    assert done.result["rows_left_out"]["count"] == 3
    assert run(tmp_path / "skipping", three, on_bad_rows="skip").result == done.result
    # Nothing of a source with bad rollouts stands before that is allowed.
    assert pq.read_table(tmp_path / "shards").num_rows == 20


def test_one_bad_file_is_told_as_it_is(tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(DataError, match=r"a\.pt: it refers to posix\.getcwd, which is no tensor") as caught:
        run(tmp_path / "shards", tmp_path / "a.pt")
    assert "take that field out" in caught.value.hint


def test_progress_is_told_over_bytes_and_rows(tmp_path, three):
    events = [event for event in run(tmp_path / "shards", three).events if isinstance(event, Progress)]
    assert {event.unit for event in events} == {"bytes"}
    assert all(0 < event.done <= event.total for event in events)


def test_a_value_of_column_that_names_no_part_is_refused_before_anything_is_read(tmp_path, three):
    with pytest.raises(DataError, match="there is no canonical column 'retunrs'; did you mean 'returns'"):
        run(tmp_path / "shards", three, column=["retunrs=x"])
    assert not (tmp_path / "shards").exists()


def test_files_that_hold_no_rollouts_are_named(tmp_path, three):
    (three / "dataset_info.json").write_text("{}")
    (three / "state.json").write_text("{}")
    done = run(tmp_path / "shards", three)
    assert "dataset_info.json and 1 more hold no rollouts, by their names, and are not read" in done.said
