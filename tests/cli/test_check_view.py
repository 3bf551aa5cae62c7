"""`check` and `fit --dry-run` as a person sees them."""

import io
import json
import os
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import warm
from rich.console import Console

from critic_train_cli.check_view import draw_check, returns_sentence
from critic_train_cli.command_results import draw_estimate

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "sample_data"
program = partial(warm.program, cwd=ROOT, environment=os.environ | {"COLUMNS": "100"})


@pytest.fixture(scope="module")
def found() -> dict:
    shown = program("check", str(SAMPLE / "train"), "--against", str(SAMPLE / "train"), "--json")
    assert shown.returncode == 1
    return json.loads(shown.stdout)


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_findings_fit_any_width(found, width):
    console = Console(width=width, record=True, file=io.StringIO())
    draw_check(console, found, shown=3)
    lines = console.export_text().splitlines()
    # The command to copy is never broken.
    assert all(len(line.rstrip()) <= width for line in lines if "critic-train" not in line)
    assert "Not sound" in lines[0]
    assert any("shape" in line for line in lines) == (width >= 70)


def test_without_a_leak_the_command_is_done():
    shown = program("check", str(SAMPLE / "val"))
    assert shown.returncode == 0
    assert shown.stdout.startswith("Sound: every row can be used.")
    assert f"critic-train fit --data {SAMPLE / 'val'}" in shown.stdout


def test_bad_rows_are_shown_up_to_a_number(tmp_path):
    table = pq.read_table(SAMPLE / "val" / "part-00000.parquet")
    returns = [row[1:] for row in table["returns"].to_pylist()]
    place = table.schema.get_field_index("returns")
    returns[-1] = table["returns"][-1].as_py()
    pq.write_table(table.set_column(place, "returns", pa.array(returns)), tmp_path / "a.parquet")
    shown = program("check", str(tmp_path), "--show", "2")
    assert shown.returncode == 1
    assert " ".join(shown.stdout.split()).count("row group 0, row") == 2  # lines fold where the path is long
    assert f"... and {len(table) - 3} more" in shown.stdout


@pytest.mark.parametrize(
    ("match", "said"),
    [
        ({"gamma": 1.0, "lam": 1.0, "found": True, "bootstrapped": False}, "match gamma 1 and lambda 1, Monte-Carlo"),
        ({"gamma": 0.99, "lam": 0.95, "found": True, "bootstrapped": False}, "match gamma 0.99 and lambda 0.95"),
        ({"gamma": 0.9, "lam": 0.5, "found": False, "bootstrapped": False, "error": 0.31}, "no match"),
    ],
)
def test_returns_in_words(match, said):
    assert said in returns_sentence({"returns": {"mean": 0.0}, "returns_match": match, "rewards": {}})


@pytest.mark.parametrize("width", [20, 80])
def test_an_estimate_says_where_it_will_not_do(width):
    found = {
        "rollouts": 1840,
        "held_out_rollouts": 208,
        "tokens": 163_000,
        "computed_tokens": 77_700,
        "steps": 87,
        "epochs": 3.0,
        "evaluations": 12,
        "parameters": 15_800_000,
        "trained_parameters": 2_600_000,
        "packing": "forest",
        "offload": "none",
        "device": "cuda:0",
        "out": "runs/train",
        "memory": {"weights": 1, "gradients": 1, "moments": 2, "peak": 79 * 10**9, "device": 80 * 10**9},
        "disk": {"checkpoint": 10**9, "cache": 10**6, "states": 3 * 10**9, "needed": 5 * 10**9, "free": 10**9},
        "seconds": {"keeping_states": 30.0, "training": 60.0, "evaluating": 12.0, "total": 102.0},
        "tokens_per_second": 5700.0,
    }
    console = Console(width=width, record=True, file=io.StringIO())
    draw_estimate(console, found)
    text = console.export_text()
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    words = " ".join(text.split())
    assert "1:42" in words
    assert "2.60M of them trained" in words
    assert "3.0 GB for the frozen trunk's states" in words
    assert "The disk will not do" in words
    assert "memory will hardly do" in words
