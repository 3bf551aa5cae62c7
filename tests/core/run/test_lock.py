"""One process a run; who is gone holds nothing."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from critic_train.errors import MachineError
from critic_train.run.lock import Lock
from critic_train.run.run_directory import RunDirectory

HOLD = """
import sys, time
from pathlib import Path
from critic_train.run.lock import Lock
with Lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / ".lock")],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(root / "core")},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_process_is_told_who_the_first_is_and_takes_over_when_it_is_killed(holder, tmp_path):
    """Scenario 8."""
    with pytest.raises(MachineError) as told, RunDirectory(tmp_path):
        pass
    assert told.value.message == f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()}"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunDirectory(tmp_path) as run:
        assert run.left_by == f"process {holder.pid} on {socket.gethostname()}"
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    with RunDirectory(tmp_path) as run:
        assert run.left_by == ""


def test_the_words_of_another_machine_do_not_hold_where_the_kernel_locks(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on elsewhere\n")
    with Lock(tmp_path / ".lock") as lock:
        assert lock.left_by == "process 1 on elsewhere"


@pytest.fixture
def no_locks(monkeypatch):
    """A file system that has none."""

    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize(
    ("words", "held"),
    [
        ("process {alive} on {here}", True),
        ("process {dead} on {here}", False),
        ("process {dead} on elsewhere", True),
        ("", False),
        ("\0\0 rubbish", False),
    ],
)
def test_without_locks_the_words_have_to_do(words, held, no_locks, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    path = tmp_path / ".lock"
    path.write_text(words.format(alive=os.getppid(), dead=gone.pid, here=socket.gethostname()))
    if held:
        with pytest.raises(MachineError) as told, Lock(path):
            pass
        assert told.value.hint == f"if that process is gone, remove {path}"
    else:
        with Lock(path):
            assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
        assert path.read_text() == ""


def test_a_lock_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(MachineError, match="cannot be written"), RunDirectory(tmp_path / "file" / "run"):
        pass
