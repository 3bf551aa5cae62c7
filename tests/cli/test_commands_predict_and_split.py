"""What `predict` and `split` say at their end, and how `predict` ends on a signal."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from support import readable_rollouts, write_shard
from warm import program

from critic_train_cli.commands import draw_prediction, draw_split

ROOT = Path(__file__).parents[2]


def drawn(draw, *told) -> str:
    out = io.StringIO()
    draw(Console(file=out, width=80), *told)
    return out.getvalue()


PREDICTED = {
    "status": "finished",
    "to": "next dir/",
    "columns": ["values", "returns"],
    "files": 2,
    "files_in_all": 2,
    "rows": 1234,
    "rows_left_out": {"count": 3},
    "next": "critic-train fit --data 'next dir/'",
}


def test_what_predict_says():
    assert drawn(draw_prediction, PREDICTED) == (
        "Finished: values, returns of 1,234 rows in 2 of 2 files in next dir/.\n"
        "3 rows could not be used: they have nulls there.\n\n"
        "Next: critic-train fit --data 'next dir/'\n"
    )
    again = PREDICTED | {"status": "already finished", "rows_left_out": None}
    assert drawn(draw_prediction, again).startswith("Already finished: values, returns of 1,234 rows")
    stopped = PREDICTED | {"status": "interrupted", "files": 1}
    assert drawn(draw_prediction, stopped) == (
        "Interrupted: 1 of 2 files stand in next dir/.\nThe same command goes on from there.\n"
    )


def test_what_split_says():
    side = {"rollouts": 1000, "prompt_groups": 125}
    result = {"to": "to/", "train": side, "val": {"rollouts": 80, "prompt_groups": 10}, "rows_left_out": {"count": 0}}
    result["next"] = "critic-train fit --data to/train --val-data to/val"
    assert drawn(draw_split, "finished", result) == (
        "to/train: 1,000 rollouts of 125 prompt groups\nto/val: 80 rollouts of 10 prompt groups\n\n"
        "Next: critic-train fit --data to/train --val-data to/val\n"
    )
    assert drawn(draw_split, "interrupted", {"to": "to/"}).startswith("Interrupted.")


def test_the_commands_that_are_printed_run(clean_environment, tmp_path):
    """On shards with rewards alone, under other names: split, fit, predict, fit, eval, each as the one before says."""
    path = write_shard(tmp_path / "data" / "a b.parquet", readable_rollouts(12), without=["returns", "values"])
    table = pq.read_table(path).rename_columns({"response_mask": "my mask", "uid": "prompt"})
    pq.write_table(table.append_column("how good", pa.array(np.arange(len(table)) % 2 * 1.0)), path)
    columns = ["--column", "response_mask=my mask", "--column", "uid=prompt", "--column", "reward=how good"]
    small = ["--preset", "tiny", "--max-steps", "1", "--no-report", "--device", "cpu"]

    def run(line, *more):
        shown = program(*line, *more, cwd=tmp_path, environment=clean_environment)
        assert shown.returncode == 0, shown.stderr
        [command] = [text for text in shown.stdout.splitlines() if text.startswith("Next: ")]
        return shlex.split(command.removeprefix("Next: critic-train "))

    fit = run(["split", "data", "--to", "parts", *columns])
    assert {"--data", "parts/train", "--val-data", "parts/val"} <= set(fit)
    judge = run(fit, *small, "--out", "run")
    shown = program(*judge, "--json", cwd=tmp_path, environment=clean_environment)
    assert shown.returncode == 0, shown.stderr
    again = run(["predict", "--data", "parts/train", "--model", "run", "--to", "next", "--device", "cpu", *columns])
    run(again, *small, "--out", "run2")
    told = json.loads(program("check", "data", *columns, "--json", cwd=tmp_path, environment=clean_environment).stdout)
    run(shlex.split(told["command"])[1:], *small, "--out", "run3")


@pytest.mark.slow
def test_predict_ends_with_143_on_sigterm_and_goes_on(clean_environment, tmp_path):
    environment = clean_environment | {"PYTHONPATH": f"{ROOT / 'core'}:{ROOT / 'cli'}", "OMP_NUM_THREADS": "1"}
    own = [sys.executable, "-m", "critic_train_cli"]
    data = str(ROOT / "sample_data" / "train")
    fit = [*own, "fit", "--data", data, "--preset", "tiny", "--max-steps", "1", "--out", str(tmp_path / "run")]
    subprocess.run([*fit, "--quiet", "--json"], env=environment, check=True, capture_output=True)
    command = [*own, "predict", "--data", data, "--model", str(tmp_path / "run"), "--to", str(tmp_path / "next")]
    going = subprocess.Popen([*command, "--max-tokens", "128"], env=environment, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "next").glob("*.parquet")):
        assert going.poll() is None
        time.sleep(0.01)
    os.kill(going.pid, signal.SIGTERM)
    _, said = going.communicate()
    assert going.returncode == 143
    assert "Traceback" not in said
    standing = {path: path.stat().st_mtime_ns for path in (tmp_path / "next").glob("*.parquet")}
    ended = subprocess.run([*command, "--max-tokens", "128", "--json"], env=environment, capture_output=True, text=True)
    result = json.loads(ended.stdout)
    assert (ended.returncode, result["status"], result["files"]) == (0, "finished", 6)
    assert {path: path.stat().st_mtime_ns for path in standing} == standing
    assert sorted(p.name for p in (tmp_path / "next").glob("*.parquet")) == sorted(
        p.name for p in Path(data).glob("*.parquet")
    )
