"""The scripts in docs/examples and the programs in examples/python do what they say."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture
def programs(tmp_path) -> Path:
    """A folder that comes first on PATH, with critic-train in it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write_program(folder / "critic-train", f'exec "{sys.executable}" -m critic_train_cli "$@"')
    return folder


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def environment(programs: Path, **more: str) -> dict[str, str]:
    return os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'core'}:{ROOT / 'cli'}",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def run(name: str, programs: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(EXAMPLES / name), *arguments],
        cwd=ROOT,
        env=environment(programs, **more),
        capture_output=True,
        text=True,
    )


def pretrained(programs: Path, out: Path) -> "subprocess.CompletedProcess[str]":
    return run("pretrain.sh", programs, "--preset", "tiny", "--max-steps", "16", "--no-report", OUT=str(out))


@pytest.mark.parametrize("name", ["pretrain.sh", "sweep.sh", "loop.sh"])
def test_their_command_lines_are_understood(name, programs, tmp_path):
    """Each command prints its settings in place of a job; what the jobs do is a slow test's."""
    log = tmp_path / "log"
    write_program(
        programs / "critic-train",
        f'echo "$1" >> "{log}"; exec "{sys.executable}" -m critic_train_cli "$@" --print-config',
    )
    (tmp_path / "out" / "best").mkdir(parents=True)
    shown = run(name, programs, OUT=str(tmp_path / "out"), RATES="1e-3 4e-3")
    assert (shown.returncode, shown.stderr) == (0, "")
    commands = {"pretrain.sh": "check fit eval", "sweep.sh": "fit fit eval", "loop.sh": "fit predict fit eval"}
    assert log.read_text().split() == commands[name].split()


@pytest.mark.slow
def test_a_value_model_is_pretrained_and_handed_over(programs, tmp_path):
    shown = pretrained(programs, tmp_path)
    assert shown.returncode == 0, shown.stderr
    best = f"{os.path.realpath(tmp_path)}/checkpoints/{(tmp_path / 'best').readlink().name}"
    tokenizer = "critic.model.tokenizer_path=POLICY (there is no tokenizer beside this critic)"
    assert shown.stdout.splitlines()[-1] == f"for verl: critic.model.path={best} {tokenizer}"


@pytest.mark.slow
def test_a_value_model_is_pretrained_once(programs, tmp_path):
    assert pretrained(programs, tmp_path).returncode == 0
    again = pretrained(programs, tmp_path)
    assert again.returncode == 0
    assert "Already finished" in again.stdout


@pytest.mark.slow
def test_a_sweep_compares_its_runs(programs, tmp_path):
    more = {"OUT": str(tmp_path / "sweep"), "RATES": "1e-3 4e-3"}
    shown = run("sweep.sh", programs, "--preset", "tiny", "--max-steps", "8", **more)
    assert shown.returncode == 0, shown.stderr
    assert {"lr-1e-3", "lr-4e-3"} <= set(re.findall(r"lr-\de-3", shown.stdout))


@pytest.mark.slow
def test_the_loop_closes_on_real_rollouts(programs, tmp_path):
    """fit, predict, fit on the output, eval; and what was written is judged as the critic that wrote it."""
    data, out = tmp_path / "data", tmp_path / "loop"
    data.mkdir()
    shutil.copy(ROOT / "sample_data" / "train" / "part-00000.parquet", data)
    more = {"DATA": str(data), "OUT": str(out)}
    shown = run("loop.sh", programs, "--preset", "tiny", "--max-steps", "4", **more)
    assert shown.returncode == 0, shown.stderr
    again = run("loop.sh", programs, "--preset", "tiny", "--max-steps", "4", **more)
    assert again.returncode == 0
    assert again.stdout.count("Already finished") == 3

    def verdict(*arguments: str) -> dict:
        command = ["critic-train", "eval", *arguments, "--json", "--quiet"]
        return json.loads(subprocess.run(command, env=environment(programs), capture_output=True, cwd=ROOT).stdout)

    before, after = (pq.read_table(folder) for folder in (data, out / "rollouts"))
    others = [name for name in before.column_names if name not in ("values", "returns")]
    assert after.select(others) == before.select(others)
    assert after.column_names == [*before.column_names, "advantages"]
    stored = verdict("--data", str(out / "rollouts"), "--returns", "mc")
    critic = verdict("--data", str(data), "--returns", "mc", "--model", str(out / "first"))
    for figure in ("explained_variance", "mse", "bias", "pearson"):
        assert stored[figure] == critic[figure]


@pytest.mark.parametrize(("code", "requeued", "judged"), [(0, False, True), (143, True, False), (3, False, False)])
def test_a_slurm_job_is_queued_again_after_a_preemption_only(programs, tmp_path, code, requeued, judged):
    log = tmp_path / "log"
    write_program(
        programs / "critic-train",
        f"trap 'echo heard >> \"{log}\"; sleep 0.3; exit {code}' TERM\n"
        f'echo "critic-train $1" >> "{log}"\n'
        f"if [[ $1 == eval ]]; then echo '{{}}'; exit; fi\n"
        + ("while true; do sleep 0.1; done" if code == 143 else f"exit {code}"),
    )
    write_program(programs / "scontrol", f'echo "scontrol $*" >> "{log}"')
    out = tmp_path / "run"
    out.mkdir()
    job = subprocess.Popen(
        [str(EXAMPLES / "slurm.sh")], env=environment(programs, OUT=str(out), SLURM_JOB_ID="17"), cwd=ROOT
    )
    if code == 143:
        while not (log.exists() and catches(job.pid, signal.SIGTERM)):
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=300) == code
    told = log.read_text().splitlines()
    assert ("scontrol requeue 17" in told) == requeued
    assert ("critic-train eval" in told) == judged
    assert (out / "held_out.json").exists() == judged


@pytest.fixture
def run_program(capsys) -> Iterator[Callable[..., list[str]]]:
    """Runs a program of examples/python in this process; gives the lines that it prints."""
    handler = signal.getsignal(signal.SIGINT)

    def run(name: str, *arguments: str) -> list[str]:
        runpy.run_path(str(ROOT / "examples" / "python" / f"{name}.py"))["main"](*arguments)
        return capsys.readouterr().out.splitlines()

    yield run
    signal.signal(signal.SIGINT, handler)


def test_the_library_trains_and_judges(run_program, tmp_path):
    trained = run_program("fit", str(tmp_path / "run"), "1")
    assert any(line.startswith("step 1: held-out explained variance") for line in trained)
    assert trained[-1] == f"finished: the best critic is {tmp_path / 'run' / 'best'}"
    judged = run_program("evaluate", str(tmp_path / "run"))
    rows = [line.split()[0] for line in judged[1:7]]
    assert rows == [str(tmp_path / "run"), "task", "task", "constant", "stored", "group_mean"]


def test_rollouts_of_ones_own_are_written_checked_and_trained_on(run_program, tmp_path):
    shown = run_program("custom_data", str(tmp_path), "60")
    assert shown[0].startswith("512 rollouts, 0 of them cannot be used")
    assert shown[1] == "finished"
    right, wrong = ([float(value) for value in line.split()] for line in shown[2:])
    assert right[:2] == wrong[:2]  # before the first wrong token there is no difference
    assert right[2] - wrong[2] > 0.2
    assert right[3] - wrong[3] > 0.2


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.findall(r"^SigCgt:\s*(\w+)", status, flags=re.MULTILINE)[0], 16) >> (number - 1) & 1)
