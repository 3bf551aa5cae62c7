"""What `predict` and `split` say at their end, and how `predict` ends on a signal."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

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
    assert drawn(draw_split, "finished", result) == (
        "to/train: 1,000 rollouts of 125 prompt groups\nto/val: 80 rollouts of 10 prompt groups\n\n"
        "Next: critic-train fit --data to/train --val-data to/val\n"
    )
    assert drawn(draw_split, "interrupted", {"to": "to/"}).startswith("Interrupted.")


@pytest.mark.slow
def test_predict_ends_with_143_on_sigterm_and_goes_on(clean_environment, tmp_path):
    environment = clean_environment | {"PYTHONPATH": f"{ROOT / 'core'}:{ROOT / 'cli'}", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "critic_train_cli"]
    data = str(ROOT / "sample_data" / "train")
    fit = [*program, "fit", "--data", data, "--preset", "tiny", "--max-steps", "1", "--out", str(tmp_path / "run")]
    subprocess.run([*fit, "--quiet", "--json"], env=environment, check=True, capture_output=True)
    command = [*program, "predict", "--data", data, "--model", str(tmp_path / "run"), "--to", str(tmp_path / "next")]
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
