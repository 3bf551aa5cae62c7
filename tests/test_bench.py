"""The benchmarks run; what they find is for people to read."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_one_command_prints_tables_and_keeps_them(tmp_path, monkeypatch, capsys):
    kept = tmp_path / "found.json"
    arguments = ["planning", "attention", "--size", "quick", "--rounds", "1", "--device", "cpu", "--json", str(kept)]
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    from bench.__main__ import main

    assert main() == 0
    found = json.loads(kept.read_text())
    assert {"machine", "torch", "python", "threads", "rounds"} <= set(found["machine"])
    assert [part["name"] for part in found["benchmarks"]] == ["planning", "attention"]
    planning, attention = found["benchmarks"]
    assert [row["mini-batch"] for row in planning["rows"]] == [64, 256, 1024, 4096]
    assert all(0 < row["fill"] <= row["of what fits"] <= 1 for row in planning["rows"])
    assert max(row["relative error"] for row in attention["rows"]) < 1e-5
    shown = capsys.readouterr().out
    assert "Planning a million rollouts" in shown
    assert "pieces, forest" in shown


def test_an_unknown_name_is_told_the_known_ones(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", ["bench", "speed"])
    from bench.__main__ import main

    assert main() == 2
    files = sorted(path.stem for path in (ROOT / "bench" / "entries").glob("[a-z]*.py"))
    assert f"no benchmark 'speed'; there are {', '.join(files)}" in capsys.readouterr().err


def test_the_steps_that_are_compared_run(monkeypatch):
    """The bare pass reaches into the critic: a change there is seen here, and not first by the next who measures."""
    monkeypatch.syspath_prepend(ROOT)
    import torch
    from bench.drawing import Shape
    from bench.entries.step import measure
    from bench.entry import Options
    from bench.models import MODELS

    options = Options(device=torch.device("cpu"), rounds=1, size="quick")
    row = measure(MODELS["Llama"], Shape("tiny", 24, 4, 8, responses=3), 64, "fp32", options)
    assert all(len(rounds) == 1 and rounds[0] > 0 for rounds in row["seconds"].values())
    assert row["padded/computed"] > 1
