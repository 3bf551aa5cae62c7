"""The benchmarks run; what they find is for people to read."""

import json
import multiprocessing
import os
import signal
import sys
import time
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
    from bench.worlds import STATES, World

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


def test_shares_are_of_the_true_values_and_free_of_their_sampling_noise(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench.worlds import ceiling, explained, shares

    rows = {"uid": ["0", "0"], "input_ids": [[2, 2, 2]] * 2, "response_mask": [[False, True, True]] * 2}
    table = pa.table(rows | {"true_values": [[0.0, 0.2, 0.4], [0.0, 0.6, 0.8]]})
    perfect = shares(table, np.array([0.2, 0.4, 0.6, 0.8]))
    assert (perfect.overall, perfect.within) == (1.0, 1.0)
    constant = shares(table, np.full(4, 0.5))
    assert (constant.overall, constant.within) == (pytest.approx(0.0), pytest.approx(0.0))
    assert shares(pa.table(rows), np.full(4, 0.5)) is None

    # Of the returns: 4 tokens of returns 0, 0, 1, 1 in one prompt, the noise in the ceiling too.
    returned = table.append_column("returns", [[[0.0] * 3, [1.0] * 3]])
    found = ceiling(returned)
    assert found.overall == found.within == pytest.approx(1 - np.var([0.2, 0.4, -0.4, -0.2]) / 0.25)
    assert explained(returned, np.array([0.0, 0.0, 1.0, 1.0])).overall == 1.0
    other = returned.set_column(0, "uid", [["0", "1"]])  # each rollout a prompt of its own: nothing to explain within
    apart = explained(other, np.array([0.2, 0.4, 0.6, 0.8]))
    assert apart.overall == found.overall
    assert np.isnan(apart.within)

    # 500 prompts of 4 states; the true values are known by the mean of 16 coins each, and of some states not at all.
    draw = np.random.default_rng(0)
    true = draw.random((500, 1)) * 0.5 + draw.random((500, 4)) * 0.5
    sampled = draw.binomial(16, true) / 16
    variance = sampled * (1 - sampled) / 15
    sampled[:, 0] = np.nan
    table = pa.table(
        {
            "uid": [str(number) for number in range(500)],
            "input_ids": [[2] * 5] * 500,
            "response_mask": [[False] + [True] * 4] * 500,
            "true_values": [[0.0, *row] for row in sampled.tolist()],
            "true_values_variance": [[0.0, *row] for row in variance.tolist()],
        }
    )
    found = shares(table, true.ravel())
    assert (found.overall, found.within) == (pytest.approx(1.0, abs=0.03), pytest.approx(1.0, abs=0.06))
    off = shares(table, true.ravel() + 0.1 * draw.standard_normal(2000))
    known = true[:, 1:]
    assert off.overall == pytest.approx(1 - 0.01 / known.var(), abs=0.04)


def test_an_ingredient_is_taken_out_with_as_many_passes_as_the_default_makes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench.entries.ablation import passes

    assert passes(12)["next-token loss"] == {"epochs": 12, "lm_loss_weight": 0.0}
    assert {name: given["epochs"] for name, given in passes(12).items() if given["epochs"] != 12} == {
        "12 passes: 6": 6,
        "12 passes: 3": 3,
    }
    assert all(given["epochs"] == 1 for given in passes(1).values())


def test_a_sum_is_worth_nothing_after_a_wrong_digit(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    import torch
    from bench.adding import END, PEERS, PREFIXES, PROMPT, are_right, continued, sample_values, sums
    from bench.worlds import row

    right = sums(np.random.default_rng(0), 16)
    for line in right.tolist():
        total = line[PROMPT - 1]
        for digit, added in zip(line[PROMPT:-1:2], line[PROMPT + 1 : -1 : 2], strict=True):
            total += digit
            assert added == total
    assert are_right(torch.from_numpy(right)).all()
    for place in range(PROMPT + 1, right.shape[1], 2):  # a wrong sum, an END too early
        for token in (right[:, place] + 1, np.full(16, END)):
            wrong = right.copy()
            wrong[:, place] = token
            assert not are_right(torch.from_numpy(wrong)).any()
    assert not are_right(torch.from_numpy(np.where(right == END, 0, right))).any()
    wrong_at = PROMPT + 5

    class Adds:
        """Draws 1s and adds them, the third sum wrongly with 1 chance in 2."""

        def __call__(self, input_ids, past_key_values, use_cache):
            rows = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], dim=1)
            length, scores = rows.shape[1], torch.full((len(rows), 1, END + 1), -1e9)
            token = torch.ones(len(rows), dtype=torch.int64)
            if (length - PROMPT) % 2:
                token = rows[:, -2] + rows[:, -1]
            if length == right.shape[1] - 1:
                token[:] = END
            scores[torch.arange(len(rows)), 0, token] = 0.0
            if length == wrong_at:
                scores[torch.arange(len(rows)), 0, token + 1] = 0.0
            output = type("Output", (), {})()
            output.logits, output.past_key_values = scores, rows
            return output

    draw = torch.Generator().manual_seed(0)
    rollouts = continued(Adds(), torch.from_numpy(right[:, :PROMPT]).repeat_interleave(PEERS, 0), draw)
    ends = are_right(rollouts)
    assert 0.3 < ends.double().mean() < 0.7
    rows = [row(str(i // PEERS), ids, PROMPT, 0.0) for i, ids in enumerate(rollouts.tolist())]
    sample_values(rows, rollouts, Adds(), draw)
    known = [(i, at) for i, entry in enumerate(rows) for at, v in enumerate(entry["true_values"]) if v == v]
    assert len(known) == 16 * PREFIXES
    for i, at in known:  # the value is that of the state before the token
        value, variance = (rows[i][name][at] for name in ("true_values", "true_values_variance"))
        assert value == pytest.approx(0.5, abs=0.3) if at <= wrong_at else value == float(ends[i])
        assert variance == pytest.approx(value * (1 - value) / 63)


def test_a_part_of_the_device_benchmark_that_is_cut_off_or_fails_still_tells_and_is_tried_again(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT)
    import torch
    from bench.entries import device
    from bench.entry import Options

    tells = "import sys, time; from bench.device.telling import tell; print('.', end=''); "
    tells += "tell('found', number=3); print('other'); "
    ways = {"good": "pass", "slow": "time.sleep(60)", "bad": "sys.exit(3)"}
    started = []

    def command_of(part, options):
        started.append(part.name)
        return [sys.executable, "-c", tells + ways[part.name]]

    monkeypatch.setattr(device, "command_of", command_of)
    monkeypatch.setattr(device, "PARTS", [device.Part(name, 5 if name == "slow" else 50, 1) for name in ways])
    options = Options(device=torch.device("cpu"), json=tmp_path / "found.json")
    rows = device.run(options).rows
    assert [row["how"] for row in rows] == ["ended", "cut off at its limit", "failed with exit code 3"]
    assert [row["all"] for row in rows] == [[{"line": "found", "number": 3}]] * 3
    ways["slow"] = ways["bad"] = "pass"
    assert [row["how"] for row in device.run(options).rows] == ["done before", "ended", "ended"]
    assert started == ["good", "slow", "bad", "slow", "bad"]
    kept = [json.loads(line) for line in (tmp_path / "found.parts.jsonl").read_text().splitlines()]
    assert sum("finding" in fact for fact in kept) == 5
    assert all("other" in fact["output"] for fact in kept if "how" in fact)
    little = Options(device=torch.device("cpu"), minutes=0.001)
    assert {row["how"] for row in device.run(little).rows} == {"left out: no time"}


def rank_that_is_killed(answers, rank, size, port, tokens):
    """Rank 1 is killed, and rank 0 waits for it, as in a collective."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def test_the_loss_of_a_rank_ends_its_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench.entries import sequence

    monkeypatch.setattr(sequence, "_rank", rank_that_is_killed)
    with pytest.raises(RuntimeError, match="rank 1 of 2 was killed by SIGKILL"):
        sequence.on_processes(2, 8)
    assert not multiprocessing.active_children()
