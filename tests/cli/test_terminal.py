"""Real runs and judgements where a batch system, a cron job or a container may put them: the data stays whole."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support import readable_rollouts, write_shard

ROOT = Path(__file__).parents[2]
NO_NETWORK = """
import os, socket
def refuse(*_, **__):
    open(os.environ["TRIED"], "a").write("x")
    raise OSError("no network here")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
"""
FIT = "fit --preset tiny --max-steps 2 --batch-size 16 --device cpu --eval-every 1 --out out"
CLOSED = {"": "", "stdout": ">&-", "stderr": "2>&-", "both": ">&- 2>&-", "all": "<&- >&- 2>&-"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rollouts in a folder whose name ASCII has not."""
    return write_shard(tmp_path / "røllouts" / "ä.parquet", readable_rollouts(8, seed=1)).parent


def shell(line: str, where: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a command line of the program in a shell without a terminal, a session of its own, and no network."""
    (where / "site").mkdir(exist_ok=True)
    (where / "site" / "sitecustomize.py").write_text(NO_NETWORK)
    told = {name: value for name, value in os.environ.items() if not name.startswith(("CRITIC_TRAIN_", "HF_"))}
    told |= {"PYTHONPATH": f"{where / 'site'}:{ROOT / 'core'}:{ROOT / 'cli'}", "TRIED": str(where / "tried")}
    command = f"{shlex.quote(sys.executable)} -m critic_train_cli {line}"
    shown = subprocess.run(
        ["bash", "-c", command],
        env=told | environment,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        cwd=where,
        start_new_session=True,
        timeout=240,
    )
    assert "Traceback" not in shown.stdout + shown.stderr
    assert not (where / "tried").exists(), "the network was asked for"
    return shown


def whole(where: Path) -> None:
    """A finished run: every line and file of it is what it should be."""
    records = [json.loads(line) for line in (where / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["event"] == "step"] == [1, 2]
    assert json.loads((where / "out" / "result.json").read_text())["status"] == "finished"
    manifest = json.loads((where / "out" / "checkpoints" / "step-00000002" / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        assert (where / "out" / "checkpoints" / "step-00000002" / name).stat().st_size == entry["bytes"]


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "20", "TERM": "dumb"}
HOMELESS = {"HOME": "/proc", "XDG_CACHE_HOME": "/proc/none", "HF_HOME": "/proc/none"}
"""A home that cannot be written to, not even by root."""


def test_fit_with_all_streams_closed_and_a_home_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    shown = shell(f"{FIT} --data {shlex.quote(str(data))} {CLOSED['all']}", tmp_path, **HOMELESS)
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "", "")
    whole(tmp_path)


@pytest.mark.slow
def test_eval_in_ascii_twenty_columns_wide_and_without_a_home(data: Path, tmp_path: Path) -> None:
    shown = shell(f"eval --data {shlex.quote(str(data))}", tmp_path, **ASCII, HOME=str(tmp_path / "nowhere"))
    assert shown.returncode == 0
    assert (shown.stdout + shown.stderr).isascii()
    assert "explained" in shown.stdout


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["", "stdout", "stderr", "both"])
@pytest.mark.parametrize("surroundings", [ASCII, HOMELESS], ids=["ascii", "homeless"])
def test_fit_anywhere(data: Path, tmp_path: Path, closed: str, surroundings: dict[str, str]) -> None:
    shown = shell(f"{FIT} --data {shlex.quote(str(data))} {CLOSED[closed]}", tmp_path, **surroundings)
    assert shown.returncode == 0
    assert ("Finished" in shown.stdout) == (closed in ("", "stderr"))
    assert ("step 2/2" in shown.stderr.replace("\n", " ")) == (closed in ("", "stdout"))
    whole(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["", "stdout", "stderr", "both", "all"])
@pytest.mark.parametrize("surroundings", [ASCII, HOMELESS], ids=["ascii", "homeless"])
def test_eval_anywhere(data: Path, tmp_path: Path, closed: str, surroundings: dict[str, str]) -> None:
    shown = shell(f"eval --json --data {shlex.quote(str(data))} {CLOSED[closed]}", tmp_path, **surroundings)
    assert shown.returncode == 0
    if closed in ("", "stderr"):
        assert json.loads(shown.stdout)["rollouts"] == 32


@pytest.mark.parametrize("closed", ["stdout", "stderr", "both", "all"])
def test_files_do_not_take_the_places_of_closed_streams(tmp_path: Path, closed: str) -> None:
    script = (
        "import os, sys; from critic_train_cli.terminal import open_closed_descriptors as reopen; reopen();"
        "new = os.open('log', os.O_CREAT | os.O_RDWR); os.write(new, str(new).encode())"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)} {CLOSED[closed]}"
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'core'}:{ROOT / 'cli'}"}
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True)
    assert int((tmp_path / "log").read_text()) > 2
