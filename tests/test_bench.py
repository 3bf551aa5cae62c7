"""The benchmarks run; what they find is for people to read."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

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


def test_the_values_of_a_drawn_world_are_the_returns_to_expect(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench.entries.quality import STATES, World, shares

    world, draw = World(3), np.random.default_rng(0)
    state, belief = 4, np.full(STATES, 1 / STATES)
    for _ in range(6):
        state, _, belief = world.step(draw, state, belief)
    drawn = [world.rollout(draw, [], int(draw.choice(STATES, p=belief)), belief) for _ in range(400)]
    first, outcomes = drawn[0][1][0], [outcome for _, _, outcome in drawn]
    assert all(values[0] == first for _, values, _ in drawn)
    assert np.mean(outcomes) == pytest.approx(first, abs=4 * np.sqrt(first * (1 - first) / 400))
    # And in the middle of a response, where the filter has learned more: errors of the values average out.
    errors = [outcome - values[10] for _, values, outcome in drawn]
    assert abs(np.mean(errors)) < 4 * np.std(errors) / 20
    rows = {"uid": ["0", "0"], "input_ids": [[2, 2, 2]] * 2, "response_mask": [[False, True, True]] * 2}
    table = pa.table(rows | {"true_values": [[0.0, 0.2, 0.4], [0.0, 0.6, 0.8]]})
    assert shares(table, np.array([0.2, 0.4, 0.6, 0.8])) == (1.0, 1.0)
    assert shares(table, np.full(4, 0.5)) == (pytest.approx(0.0), pytest.approx(0.0))
