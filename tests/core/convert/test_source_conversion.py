"""Several processes: the same shards, whatever their number, and whatever happens to one of them."""

import json
import os
import signal

import pytest
from conftest import content, lines, run, write_lines
from support import StopAfter

from critic_train.convert import source_conversion
from critic_train.errors import ConfigError, DataError, MachineError


@pytest.fixture(autouse=True)
def _two_processors(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})


def record(folder):
    """What is recorded of a conversion, but for what it was told to do."""
    return json.loads((folder / "_convert.json").read_text())["sources"]


@pytest.mark.parametrize("count", [2, 3])
def test_the_shards_are_the_same_whatever_the_number_of_processes(tmp_path, three, count):
    (three / "3.jsonl").write_text('{"a": 1}\n')
    lines(three / "4.jsonl", 20, start=60, bad=(3,))
    options = {"on_bad_rows": "skip", "on_bad_file": "skip"}
    one = run(tmp_path / "one", three, **options)
    several = run(tmp_path / "several", three, nproc=count, **options)
    assert content(several.to) == content(one.to)
    assert record(several.to) == record(one.to)
    assert {**several.result, "to": "", "next": ""} == {**one.result, "to": "", "next": ""}
    assert several.said == one.said
    again = run(tmp_path / "several", three, nproc=count, **options)
    assert again.result == several.result


def test_a_stop_leaves_what_the_same_command_goes_on_from(tmp_path, three):
    whole = content(run(tmp_path / "whole", three).to)
    for looks in (0, 1, 2):
        stopped = run(tmp_path / f"s{looks}", three, nproc=2, stop=StopAfter(looks=looks))
        assert stopped.ended.status in ("interrupted", "finished")
        assert {entry["name"] for entry in record(stopped.to)} <= {str(path) for path in three.iterdir()}
        assert content(run(stopped.to, three, nproc=2).to) == whole


def test_errors_of_a_process_are_those_of_one_alone(tmp_path, three):
    lines(three / "4.jsonl", 20, start=60, bad=(3,))
    with pytest.raises(DataError) as alone:
        run(tmp_path / "one", three)
    with pytest.raises(DataError) as among:
        run(tmp_path / "two", three, nproc=2)
    assert among.value.message == alone.value.message
    write_lines(three / "5.jsonl", [{"prompt": "say p", "response": "p", "score": 1}])
    with pytest.raises(ConfigError, match="holds no token ids"):
        run(tmp_path / "text", three, nproc=2)


def test_a_process_that_is_killed_is_told(tmp_path, three, monkeypatch):
    monkeypatch.setattr(source_conversion, "convert_source", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(MachineError, match="a process of --nproc ended") as caught:
        run(tmp_path / "shards", three, nproc=2)
    assert "fewer --nproc" in caught.value.hint


def test_more_processes_than_processors_are_refused(tmp_path, three):
    with pytest.raises(ConfigError, match="--nproc 64: this machine has 3 processors") as caught:
        run(tmp_path / "shards", three, nproc=64)
    assert caught.value.hint == "--nproc 3"
    assert not (tmp_path / "shards").exists()
