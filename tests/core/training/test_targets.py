"""`fit --returns`: runs on rewards are those on the returns that they come to, and moving targets resume to the bit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import StopAfter, readable_rollouts, write_shard

from critic_train.data.returns import gae
from critic_train.errors import ConfigError, DataError
from critic_train.events import Notice, RunEnded, RunStarted
from critic_train.rollouts import Rollouts
from critic_train.run.checkpoint import checkpoints
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit


def run(shards: Path, out: Path, stop: StopRequest | None = None, **changes: object) -> list:
    defaults: dict[str, object] = {
        "data": [str(shards)],
        "out": str(out),
        "preset": "tiny",
        "batch_size": 16,
        "max_tokens": 150,
        "epochs": 2,
        "eval_every": 4,
        "lr": 3e-3,
        "device": "cpu",
        "no_report": True,
    }
    return list(fit(FitSettings(**(defaults | changes)), stop or StopRequest()))  # type: ignore[arg-type]


def outcome(out: Path) -> tuple[bytes, bytes]:
    last = checkpoints(out / "checkpoints")[-1]
    return (last / "model.safetensors").read_bytes(), (out / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    """The reward is 1 or 0 by the prompt; every third rollout was cut."""
    read = readable_rollouts(20, seed=1)
    values = np.random.default_rng(0).normal(0.5, 0.2, len(read.input_ids)).astype(np.float32)
    reward = read.returns[read.offsets[:-1]]
    rewards = np.zeros_like(values)
    rewards[read.offsets[1:] - 1] = reward
    return replace(read, values=values, rewards=rewards, truncated=np.arange(len(read)) % 3 == 0)


def write(folder: Path, rollouts: Rollouts, **columns: object) -> Path:
    path = write_shard(folder / "a.parquet", rollouts, without=["returns"])
    table = pq.read_table(path)
    for name, column in columns.items():
        table = table.drop_columns([name]) if column is None else table.append_column(name, pa.array(column))
    pq.write_table(table, path)
    return folder


@pytest.fixture(scope="module")
def rewarded(rollouts, tmp_path_factory) -> Path:
    reward = rollouts.rewards[rollouts.offsets[1:] - 1]
    return write(tmp_path_factory.mktemp("rewarded"), rollouts, reward=reward, truncated=rollouts.truncated)


def last_values(rollouts: Rollouts) -> np.ndarray:
    return np.where(rollouts.truncated, rollouts.values[rollouts.offsets[1:] - 1], 0.0)


@pytest.mark.parametrize(
    ("flags", "gamma", "lam", "bootstrapped"),
    [
        ({"returns": "mc", "gamma": 0.9}, 0.9, 1.0, False),
        ({"returns": "gae", "gamma": 0.97, "lam": 0.8}, 0.97, 0.8, False),
        ({"returns": "gae", "lam": 0.8, "truncated": "bootstrap"}, 1.0, 0.8, True),
        ({"returns": "mc", "truncated": "bootstrap", "gamma": 0.9}, 0.9, 1.0, True),
    ],
)
def test_computed_returns_train_as_stored_ones_do(flags, gamma, lam, bootstrapped, rollouts, rewarded, tmp_path):
    following = last_values(rollouts) if bootstrapped else None
    columns = (rollouts.rewards, rollouts.values, rollouts.response_mask, rollouts.offsets)
    _, returns = gae(*columns, gamma=gamma, lam=lam, bootstrap=following)
    stored = write_shard(tmp_path / "a.parquet", replace(rollouts, returns=returns.astype(np.float32)))
    run(stored, tmp_path / "stored", max_steps=3)
    started = run(rewarded, tmp_path / "computed", max_steps=3, **flags)
    # Monte-Carlo sums are taken without values: the same but for the last bit.
    if flags["returns"] == "gae":
        assert outcome(tmp_path / "stored")[0] == outcome(tmp_path / "computed")[0]
    else:
        figures = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("stored", "computed")]
        assert figures[0]["training"]["value_loss"] == pytest.approx(figures[1]["training"]["value_loss"], rel=1e-5)
    summary = next(event.summary for event in started if isinstance(event, RunStarted))
    assert summary["returns"].startswith(f"{flags['returns']}, gamma {gamma:g}")


def test_cut_rollouts_are_left_out_and_counted(rollouts, rewarded, tmp_path):
    events = run(rewarded, tmp_path / "dropped", max_steps=2, returns="mc", truncated="drop")
    assert any(isinstance(e, Notice) and "27 cut rollouts are left out" in e.message for e in events)
    kept = rollouts.take(np.flatnonzero(~rollouts.truncated))
    run(
        write(tmp_path / "kept", kept, reward=kept.rewards[kept.offsets[1:] - 1]),
        tmp_path / "k",
        max_steps=2,
        returns="mc",
    )
    assert outcome(tmp_path / "dropped")[0] == outcome(tmp_path / "k")[0]


SLOW = pytest.mark.slow
MOVING = {"returns": "gae", "lam": 0.8, "old_values": "epoch"}


@pytest.fixture(scope="module", params=[{}, {"no_clip": True, "truncated": "bootstrap"}], ids=["clip", "no clip"])
def moving(request, rewarded, tmp_path_factory) -> tuple[dict, tuple[bytes, bytes]]:
    out = tmp_path_factory.mktemp("moving")
    flags = MOVING | request.param
    run(rewarded, out, **flags)
    return flags, outcome(out)


@pytest.mark.parametrize("looks", [2, pytest.param(12, marks=SLOW), 25, pytest.param(40, marks=SLOW)])
def test_moving_targets_resume_bit_identical(looks, moving, rewarded, tmp_path):
    flags, expected = moving
    first = run(rewarded, tmp_path, StopAfter(looks=looks), **flags)[-1]
    assert isinstance(first, RunEnded)
    assert first.status == "interrupted"
    assert run(rewarded, tmp_path, **flags)[-1].status == "finished"
    assert outcome(tmp_path) == expected


def test_targets_move_with_the_critic(moving, rewarded, rollouts, tmp_path):
    """In the first epoch all old values are the head's bias: GAE's returns are then known, and so is the first loss."""
    flags, expected = moving
    records = [json.loads(line) for line in expected[1].decode().splitlines()]
    first = next(record for record in records if record["event"] == "step")
    held_out = 2
    started = next(e for e in run(rewarded, tmp_path, max_steps=1, **flags) if isinstance(e, RunStarted))
    assert started.summary["prompt_groups"] == 20 - held_out
    bias = started.summary["mean_return"]
    # Any of the mini-batches' rollouts: returns lie between the bias and the reward, by their distance to the end.
    following = np.where(rollouts.truncated, bias, 0.0) if "truncated" in flags else None
    columns = (rollouts.rewards, np.full(len(rollouts.input_ids), bias), rollouts.response_mask, rollouts.offsets)
    _, returns = gae(*columns, gamma=1.0, lam=0.8, bootstrap=following)
    losses = 0.5 * np.square(bias - returns[rollouts.response_mask])
    assert 0.5 * losses.mean() < first["value_loss"] < 1.6 * losses.mean()
    fixed = 0.5 * np.square(bias - rollouts.returns[rollouts.response_mask]).mean()
    assert first["value_loss"] < 0.8 * fixed


def test_held_out_rollouts_are_judged_by_returns_that_do_not_move(moving, rewarded, rollouts, tmp_path):
    flags, _ = moving
    events = run(rewarded, tmp_path / "moving", max_steps=2, **flags)
    assert any(isinstance(e, Notice) and "evaluated against Monte-Carlo returns" in e.message for e in events)
    result = events[-1].result
    run(rewarded, tmp_path / "mc", max_steps=2, returns="mc", **({"truncated": "drop"} if "truncated" in flags else {}))
    other = json.loads((tmp_path / "mc" / "result.json").read_text())
    figures = [r["baselines"]["constant"]["mse"] for r in (result, other)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)


def test_gae_with_its_own_values_needs_none_in_the_shards(rollouts, tmp_path):
    shards = write(tmp_path / "data", rollouts, rewards=_rows(rollouts), values=None)
    assert run(shards, tmp_path / "out", max_steps=2, **MOVING)[-1].status == "finished"
    with pytest.raises(DataError, match="values: the values stored at rollout time"):
        run(shards, tmp_path / "other", returns="gae", lam=0.8, old_values="none")


def test_returns_are_part_of_what_a_run_was_started_with(rewarded, tmp_path):
    run(rewarded, tmp_path, max_steps=1, returns="mc")
    with pytest.raises(ConfigError, match=r"--gamma was 1\.0, is now 0.5"):
        run(rewarded, tmp_path, max_steps=1, returns="mc", gamma=0.5)


def _rows(rollouts: Rollouts) -> list[list[float]]:
    bounds = zip(rollouts.offsets[:-1].tolist(), rollouts.offsets[1:].tolist(), strict=True)
    return [rollouts.rewards[a:b].tolist() for a, b in bounds]
