"""A rank beside rank 0: it ends with rank 0, and of two signals the second ends it at once."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORK = """
import os, sys, time
from critic_train import worker
from critic_train.events import Notice
def run(task, stop):
    yield Notice(message="begun")
    print("running", task["command"], flush=True)
    while not (stop.requested and os.environ["WAITS"] == "for one signal"):
        time.sleep(0.01)
    print("stopped", stop.signal_number, flush=True)
worker.run = run
sys.exit(worker.main())
"""


@pytest.fixture
def started(request) -> Iterator["subprocess.Popen[str]"]:
    """A worker that has read its task and waits in it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "core"), "WAITS": getattr(request, "param", "for one signal")}
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", WORK], env=environment, stdin=pipe, stdout=pipe, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"command": "fit", "settings": {}}) + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == "running fit\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks(started, number):
    started.send_signal(number)
    assert started.stdout.readline() == f"stopped {number}\n"
    assert started.wait(300) == 0


@pytest.mark.parametrize("started", ["for two signals"], indirect=True)
def test_the_second_signal_ends_it_at_once(started):
    while started.poll() is None:  # two that come together are one to the kernel
        started.send_signal(signal.SIGTERM)
    assert started.returncode == 128 + signal.SIGTERM


def test_it_ends_with_rank_0(started):
    started.stdin.close()
    assert started.wait(300) == 1
    assert started.stdout.read() == ""
