"""`critic-train report` and `eval --report` from the command line."""

import json
import os
import pty
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from support import readable_rollouts, write_shard
from warm import program

ROOT = Path(__file__).parents[2]
BIN = {"tokens": 9, "rollouts": 3, "mean_value": 0.2, "mean_return": 0.3, "interval": [0.1, 0.4]}
VERDICT = {
    "words": ["beats the constant baseline: explained variance 0.41"],
    "critics": {"m": {"explained_variance": 0.41, "calibration": [BIN, BIN | {"mean_value": 0.6}]}},
    "baselines": {},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shard(tmp_path_factory.mktemp("rollouts") / "a.parquet", readable_rollouts(12))


@pytest.fixture
def critic_train(clean_environment, tmp_path):
    """Run the program itself, nothing scripted."""
    return partial(program, cwd=tmp_path, environment=clean_environment)


def test_eval_writes_a_page_and_its_json_can_be_reported_again(critic_train, shards, tmp_path):
    judged = critic_train("eval", "--data", str(shards), "--report", "page.html", "--json")
    assert judged.returncode == 0, judged.stderr
    assert "report: page.html (" in judged.stderr
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "Rollouts to read" in page
    (tmp_path / "held out.json").write_text(judged.stdout)
    told = critic_train("report", "held out.json", "--json")
    assert told.returncode == 0, told.stderr
    result = json.loads(told.stdout)
    assert result == {"report": "held out.html", "bytes": result["bytes"], "sources": ["held out.json"]}
    assert (tmp_path / "held out.html").stat().st_size == result["bytes"]


def test_wrong_command_lines(critic_train):
    shown = critic_train("report", "nowhere")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith("error: no run and no file nowhere\nhint: give a run's directory")
    shown = critic_train("eval", "--data", "x", "--report", "no/page.html")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith("error: --report: no folder no\n")


def test_a_terminal_gets_verdict_and_charts_a_pipe_the_place(critic_train, clean_environment, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(VERDICT))
    piped = critic_train("report", "x.json")
    assert piped.stdout.startswith("x.html (")
    assert len(piped.stdout.splitlines()) == 1
    primary, secondary = pty.openpty()
    command = [sys.executable, "-m", "critic_train_cli", "report", "x.json"]
    environment = clean_environment | {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "xterm"}
    environment |= {"PYTHONPATH": f"{ROOT / 'core'}:{ROOT / 'cli'}"}
    done = subprocess.Popen(command, env=environment, stdout=secondary, stderr=secondary, cwd=tmp_path)
    os.close(secondary)
    written = b""
    while chunk := _read(primary):
        written += chunk
    assert done.wait() == 0
    text = written.decode()
    assert "\x1b" not in text
    assert "constant baseline" in text
    assert "Calibration" in text
    assert "x.html (" in text


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""
