"""Processes that rank 0 starts: what they are given, how their end is reported, and that they do not outlive it.

Shell scripts stand in for the interpreter; real workers are in test_fit_on_ranks.
"""

import json
import os
import socket
import sys
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from critic_train.distributed import launch
from critic_train.distributed.launch import Workers, open_store, threads_per_rank
from critic_train.errors import MachineError
from critic_train.settings import FitSettings

SETTINGS = FitSettings(data=["rollouts/é.parquet"], lr=3e-6, nproc=3)
TIMEOUT = timedelta(seconds=60)


@pytest.fixture
def workers(monkeypatch, tmp_path):
    """Workers that run a shell script, whatever arguments they are started with."""

    def run(script: str, size: int = 2) -> Workers:
        (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "python").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        monkeypatch.setenv("FOLDER", str(tmp_path))
        return Workers(SETTINGS, size)

    return run


@pytest.fixture
def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def lost_error(workers: Workers) -> MachineError:
    """The error of the worker that ends."""
    until = time.monotonic() + 60
    while (error := workers.lost_error()) is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    return error


@pytest.mark.parametrize("threads", [None, "5"])
def test_each_is_given_the_settings_and_its_rank(workers, monkeypatch, tmp_path, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)))
    monkeypatch.delenv("OMP_NUM_THREADS")
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    script = 'read -r line; printf "%s\\n" "$line" "$*" > "$FOLDER/task-$RANK"; env > "$FOLDER/env-$RANK"'
    with workers(script, size=3) as started:
        started.start(4242)
    for rank in (1, 2):
        task, arguments = (tmp_path / f"task-{rank}").read_text().splitlines()
        assert json.loads(task)["command"] == "fit"
        assert FitSettings(**json.loads(task)["settings"]) == SETTINGS
        assert arguments == "-m critic_train.worker"
        variables = dict(line.split("=", 1) for line in (tmp_path / f"env-{rank}").read_text().splitlines())
        assert variables["RANK"] == variables["LOCAL_RANK"] == str(rank)
        assert (variables["WORLD_SIZE"], variables["MASTER_ADDR"], variables["MASTER_PORT"]) == (
            "3",
            "127.0.0.1",
            "4242",
        )
        assert variables["OMP_NUM_THREADS"] == (threads or "2")


def test_a_worker_that_runs_is_not_lost_and_ends_with_rank_0(workers):
    with workers("cat >/dev/null") as started:
        started.start(4242)
        assert started.lost_error() is None
        (process,) = started._processes
        process.stdin.close()  # as the kernel does when rank 0 ends
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -9 $$", r"^rank 1 \(process \d+\) was killed by SIGKILL$"),
        ("echo 'no such device' >&2; exit 3", r"^rank 1 \(process \d+\) ended with exit code 3:\nno such device$"),
        ("exit 0", r"^rank 1 \(process \d+\) ended with exit code 0$"),
    ],
)
def test_the_end_of_a_worker_is_reported_with_how(workers, script, message):
    with workers(script) as started:
        started.start(4242)
        error = lost_error(started)
        with pytest.raises(MachineError, match=message):
            raise error
        assert ("--max-tokens" in error.hint) == ("kill" in script)


def test_only_the_end_of_what_it_wrote_is_repeated(workers):
    with workers("seq 1 9999 >&2; exit 1", size=3) as started:
        started.start(4242)
        head, *lines = lost_error(started).message.splitlines()
    assert head.endswith("ended with exit code 1:")
    assert lines[-1] == "9999"
    assert 350 < len(lines) <= launch.TAIL_BYTES / len("9999\n")


@pytest.mark.parametrize(
    ("script", "code"),
    [('touch "$FOLDER/begun"; exec sleep 1000', -15), ('trap "" TERM; touch "$FOLDER/begun"; exec sleep 1000', -9)],
)
def test_none_outlives_the_block(workers, monkeypatch, tmp_path, script, code):
    monkeypatch.setattr(launch, "PATIENCE_SECONDS", 0.3)
    with workers(script) as started:
        started.start(4242)
        (process,) = started._processes
        until = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < until:
            time.sleep(0.01)
    assert process.poll() == code
    assert process.stdin.closed


@pytest.mark.parametrize(("size", "threads"), [(1, 10), (2, 5), (3, 3), (20, 1)])
def test_ranks_divide_the_cores(monkeypatch, size, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10)))
    assert threads_per_rank(size) == threads


def test_rank_0_opens_a_store_where_those_it_starts_can_join(workers):
    ports = []
    started = workers("exit 0")
    started.start = ports.append
    store = open_store(0, 2, started, TIMEOUT)
    store.set("key", "value")
    joined = dist.TCPStore("127.0.0.1", ports[0], is_master=False, timeout=TIMEOUT, wait_for_workers=False)
    assert dist.PrefixStore("critic-train", joined).get("key") == b"value"


@pytest.fixture
def named_by_environment(monkeypatch, free_port):
    """An environment that says where rank 0 is, as one without torchrun does."""
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port))
    return free_port


def test_ranks_meet_where_the_environment_says(named_by_environment):
    first, second = (open_store(rank, 2, None, TIMEOUT) for rank in (0, 1))
    first.set("key", "value")
    assert second.get("key") == b"value"


@pytest.mark.parametrize("variable", ["MASTER_ADDR", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["", None])
def test_an_environment_that_does_not_say_where_rank_0_is(named_by_environment, monkeypatch, variable, value):
    monkeypatch.delenv(variable) if value is None else monkeypatch.setenv(variable, value)
    with pytest.raises(MachineError, match="WORLD_SIZE is 2, but MASTER_ADDR and MASTER_PORT do not say") as caught:
        open_store(1, 2, None, TIMEOUT)
    assert "torchrun" in caught.value.hint


def test_a_restart_by_torchrun_reads_nothing_of_the_run_before(named_by_environment, monkeypatch):
    """The agent keeps one store over all restarts."""
    agent = dist.TCPStore("127.0.0.1", named_by_environment, is_master=True, timeout=TIMEOUT, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    first = open_store(0, 2, None, TIMEOUT)
    first.set("key", "value")
    assert open_store(1, 2, None, TIMEOUT).get("key") == b"value"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not open_store(0, 2, None, TIMEOUT).check(["key"])
    assert agent.num_keys() >= 1
