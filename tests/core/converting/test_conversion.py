"""A conversion as a whole: what stands, what is refused, what goes on where it stopped."""

import contextlib
import json
import os
import pickle

import dumps
import pyarrow.parquet as pq
import pytest
import torch
from conftest import run
from support import StopAfter

from critic_train.converting.dump_files import find_sources
from critic_train.errors import ConfigError, DataError, MachineError, ModelError
from critic_train.events import Progress
from critic_train.run.lock import Lock
from critic_train.settings import ConvertSettings


def lines(path, count, *, start=0, bad=()):
    rows = [
        {"input_ids": [1, 2 + i % 90, 3], "response_mask": [0, 1, 1], "returns": [0, 1, i], "uid": str(i // 4)}
        for i in range(start, start + count)
    ]
    for place in bad:
        rows[place]["returns"] = [1] * 5
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".parquet"}


@pytest.fixture
def three(tmp_path):
    folder = tmp_path / "dumps"
    folder.mkdir()
    for place, name in enumerate(("1.jsonl", "2.jsonl", "10.jsonl")):
        lines(folder / name, 20, start=20 * place)
    return folder


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


def test_lines_that_are_no_records_are_bad_rows(tmp_path):
    path = lines(tmp_path / "a.jsonl", 3)
    good = path.read_bytes()
    path.write_bytes(good + b"\n{broken\n[1]\n" + b"[" * 100_000 + b"\n\xff\xfe{}\n" + good)
    with pytest.raises(DataError, match="4 rows cannot be used") as caught:
        run(tmp_path / "shards", path)
    assert "record 4: found no JSON" in caught.value.message
    assert "record 5: found a list, expected one JSON object a line" in caught.value.message
    assert run(tmp_path / "skipping", path, on_bad_rows="skip").result["rollouts"] == 6


def test_bad_files_are_all_named_or_left_out(tmp_path, three):
    (three / "3.pt").write_bytes(b"")
    (three / "4.pt").write_bytes(pickle.dumps(os.getcwd))
    torch.save({"model": torch.zeros(2)}, three / "5.pt")
    (three / "6.jsonl").write_text('{"a": 1}\n')
    (three / "7.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="5 files cannot be used") as caught:
        run(tmp_path / "shards", three)
    assert "3.pt: the file is empty" in caught.value.message
    assert "4.pt: it wants posix.getcwd" in caught.value.message
    assert "5.pt: is in no format that is known: it holds a dictionary of model" in caught.value.message
    assert "6.jsonl: is in no format that is known: its fields are a" in caught.value.message
    done = run(tmp_path / "shards", three, on_bad_file="skip")
    assert done.result["rollouts"] == 60
    assert done.result["files_left_out"]["count"] == 5


def test_one_bad_file_is_told_as_it_is(tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(DataError, match=r"a\.pt: it wants posix\.getcwd, which is no tensor") as caught:
        run(tmp_path / "shards", tmp_path / "a.pt")
    assert "take that field out" in caught.value.hint


def test_a_format_that_was_said_is_held_to(tmp_path, three):
    with pytest.raises(DataError, match="is not what --from slime reads"):
        run(tmp_path / "shards", three, source_format="slime")
    dumps.slime_train(dumps.rollouts(), tmp_path / "a.pt")
    assert run(tmp_path / "said", tmp_path / "a.pt", source_format="slime").result["rollouts"] == 8
    with pytest.raises(DataError, match="is not what --from verl reads"):
        run(tmp_path / "other", tmp_path / "a.pt", source_format="verl")


def test_text_needs_a_tokenizer_and_leave(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"prompt": "say p", "response": "p", "score": 1}\n')
    with pytest.raises(ConfigError, match="holds no token ids"):
        run(tmp_path / "shards", tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="holds no token ids"):
        run(tmp_path / "shards", tmp_path / "a.jsonl", tokenizer=str(tokenizer))
    with pytest.raises(ConfigError, match="--allow-retokenize needs --tokenizer"):
        ConvertSettings(source=["x"], to="y", allow_retokenize=True)
    with pytest.raises(ModelError, match="no such folder"):
        run(tmp_path / "shards", tmp_path / "a.jsonl", tokenizer=str(tmp_path / "none"), allow_retokenize=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        run(tmp_path / "shards", tmp_path / "a.jsonl", tokenizer=str(tmp_path / "empty"), allow_retokenize=True)


def test_a_tokenizer_that_asks_for_code_does_not_run_it(tmp_path, tokenizer):
    import shutil

    evil = tmp_path / "evil"
    shutil.copytree(tokenizer, evil)
    (evil / "tokenizer.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')\nclass T: pass\n")
    config = json.loads((evil / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["tokenizer.T", None]}, "tokenizer_class": "T"}
    (evil / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "a.jsonl").write_text('{"prompt": "say p", "response": "p", "score": 1}\n')
    with contextlib.suppress(ModelError):
        run(tmp_path / "shards", tmp_path / "a.jsonl", tokenizer=str(evil), allow_retokenize=True)
    assert not (tmp_path / "it ran").exists()


def test_sources_are_found_in_order_each_once_and_all_that_is_missing_is_listed(tmp_path):
    for name in ("b/step_10.jsonl", "b/step_9.jsonl", "b/.hidden.pt", "b/_x.pt", "b/notes.txt", "odd.name"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_sources([f"{tmp_path}/b", f"{tmp_path}/b/*", f"{tmp_path}/odd.name"])
    assert [source.path.name for source in found] == ["step_9.jsonl", "step_10.jsonl", "odd.name"]
    with pytest.raises(DataError, match="some sources cannot be found") as caught:
        find_sources([f"{tmp_path}/none", f"{tmp_path}/*.zip"])
    assert f"{tmp_path}/none: there is no such file" in caught.value.message
    assert "*.zip: no file matches" in caught.value.message


def test_progress_is_told_over_bytes_and_rows(tmp_path, three):
    events = [event for event in run(tmp_path / "shards", three).events if isinstance(event, Progress)]
    assert {event.unit for event in events} == {"bytes"}
    assert all(0 < event.done <= event.total for event in events)


def test_the_record_beside_the_shards_is_no_shard(tmp_path, three):
    from critic_train.data.shards import find_shards

    done = run(tmp_path / "shards", three)
    assert len(find_shards([str(done.to)])) == 3
    assert not any(part.startswith("/") for part in done.result["columns"])
