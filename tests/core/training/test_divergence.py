"""A step that is not finite is not taken; the rollouts behind it are named, kept, and readable."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import readable_rollouts, rollouts_of, small_config, write_shard

from critic_train.data import row_checks as checking
from critic_train.errors import CriticTrainError, DivergedError
from critic_train.evaluation.evaluate import evaluate
from critic_train.events import Event, Notice, RunEnded, RunStarted, StepEnded
from critic_train.model.compute import Compute
from critic_train.run.checkpoint import checkpoints
from critic_train.settings import EvalSettings, FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.divergence import find_diverged_rollouts
from critic_train.training.fit import fit
from critic_train.training.train_step import LossRecipe
from critic_train.weights.loading import build_critic
from critic_train.weights.saving import save_critic

HUGE = 3e19
"""Finite, but float32 cannot hold its square; the mean of all returns with it has one that it can."""
RECIPE = LossRecipe(cliprange_value=None, mode="token-mean", scale_factor=None)
CPU = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=60)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shards; row 6 of the second has returns that no gradient survives."""
    monkeypatch.setattr(checking, "LARGEST", math.inf)  # reading would not let it through
    folder = tmp_path / "data"
    write_shard(folder / "a.parquet", readable_rollouts(6, seed=1))
    rollouts = readable_rollouts(4, seed=2)
    rollouts.returns[rollouts.offsets[6] : rollouts.offsets[7]] = HUGE
    write_shard(folder / "b.parquet", replace(rollouts, group=rollouts.group + 100))
    return folder


def settings_for(folder: Path, out: Path, **changes: object) -> FitSettings:
    defaults = {
        "preset": "tiny",
        "batch_size": 8,
        "max_tokens": 120,
        "epochs": 2,
        "val_fraction": 0.0,
        "checkpoint_every": 1,
        "device": "cpu",
        "no_clip": True,
        "no_report": True,
    }
    return FitSettings(data=[str(folder)], out=str(out), **(defaults | changes))  # type: ignore[arg-type]


def run(settings: FitSettings) -> list[Event]:
    return list(fit(settings, StopRequest()))


def records(out: Path) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=lambda word: pytest.fail(word)) for line in lines]


def test_a_run_stops_and_names_the_rollouts(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DivergedError) as caught:
        run(settings_for(folder, out))
    (kept,) = out.glob("diverged-step-*.parquet")
    assert f"{folder / 'b.parquet'}, row group 0, row 6, uid 101" in caught.value.message.splitlines()[1]
    assert "1 of its" in caught.value.message
    assert f"kept in {kept}" in caught.value.message
    rows = pq.read_table(kept).to_pylist()
    assert rows[0]["row"] == 6
    assert rows[0]["file"].endswith("b.parquet")
    assert [row["finite"] for row in rows] == [False] + [True] * (len(rows) - 1)
    step = rows[0]["step"]
    assert kept.name == f"diverged-step-{step:08d}.parquet"
    assert [p.name for p in checkpoints(out / "checkpoints")][-1:] == ([f"step-{step - 1:08d}"] if step > 1 else [])
    assert [r["step"] for r in records(out) if r["event"] == "step"] == list(range(1, step))


def test_what_is_kept_can_be_judged(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError):
        run(settings_for(folder, tmp_path / "out"))
    kept = next((tmp_path / "out").glob("diverged-step-*.parquet"))
    *_, ended = evaluate(EvalSettings(data=[str(kept)], by=["finite"]), StopRequest())
    assert isinstance(ended, RunEnded)
    assert ended.result["returns"]["max"] == pytest.approx(HUGE)


def test_a_run_goes_on_without_such_steps_and_counts_them(folder: Path, tmp_path: Path) -> None:
    events = run(settings_for(folder, tmp_path / "out", on_non_finite="skip"))
    ended = events[-1]
    assert isinstance(ended, RunEnded)
    assert (ended.status, ended.result["skips"]) == ("finished", 2)  # once an epoch
    skips = [r for r in records(tmp_path / "out") if r["event"] == "skip"]
    assert [r["skips"] for r in skips] == [1, 2]
    taken = [e.step for e in events if isinstance(e, StepEnded)]
    assert sorted(taken + [r["step"] for r in skips]) == list(range(1, ended.result["total_steps"] + 1))
    assert sum(isinstance(e, Notice) and e.message.startswith("this step is skipped: at step") for e in events) == 2
    assert json.loads((tmp_path / "out" / "result.json").read_text())["skips"] == 2


def test_a_skipped_step_moves_nothing(folder: Path, tmp_path: Path) -> None:
    run(settings_for(folder, tmp_path / "out", on_non_finite="skip", keep=99))
    skipped = max(r["step"] for r in records(tmp_path / "out") if r["event"] == "skip")
    before, after = (tmp_path / "out" / "checkpoints" / f"step-{step:08d}" for step in (skipped - 1, skipped))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (before / name).read_bytes() == (after / name).read_bytes()


def test_too_many_skips_end_a_run_also_over_a_resume(folder: Path, tmp_path: Path) -> None:
    settings = settings_for(folder, tmp_path / "out", on_non_finite="skip", max_skips=1)
    for _ in range(2):
        with pytest.raises(DivergedError, match="1 steps were skipped, as many as --max-skips allows"):
            run(settings)


def test_a_micro_batch_is_told_from_the_others() -> None:
    critic = build_critic(small_config("Llama"), seed=0)
    draw = np.random.default_rng(0)
    rollouts = rollouts_of([draw.integers(1, 128, 20).astype(np.int32) for _ in range(12)], [5] * 12)
    rollouts.returns[rollouts.offsets[7] + 9] = 3e38
    suspects = find_diverged_rollouts(critic, rollouts, RECIPE, CPU, forest=True, steps_taken=3)
    assert suspects.index[0] == 7
    assert suspects.finite.tolist() == [False] + [True] * (len(suspects.index) - 1)
    assert 1 <= len(suspects.index) <= 3
    assert "1 of its 4 micro-batches is not finite alone" in suspects.reason
    assert all(p.grad is None for p in critic.parameters())


def test_a_sum_that_is_not_finite_is_told_from_its_parts() -> None:
    critic = build_critic(small_config("Llama"), seed=0)
    draw = np.random.default_rng(0)
    rollouts = rollouts_of([draw.integers(1, 128, 20).astype(np.int32) for _ in range(4)], [5] * 4)
    suspects = find_diverged_rollouts(critic, rollouts, RECIPE, CPU, forest=True, steps_taken=3)
    assert suspects.reason == "each of its micro-batches is finite alone, only their sum is not"
    assert suspects.index.tolist() == [0, 1, 2, 3]
    assert suspects.finite.all()


def test_a_rollout_alone_weighs_what_it_does_in_its_mini_batch() -> None:
    """Alone its gradient would be twelve times as large, and not finite."""
    critic = build_critic(small_config("Llama"), seed=0)
    draw = np.random.default_rng(0)
    rollouts = rollouts_of([draw.integers(1, 128, 20).astype(np.int32) for _ in range(12)], [5] * 12)
    rollouts.returns[rollouts.offsets[7] : rollouts.offsets[8]] = 5e18
    assert find_diverged_rollouts(critic, rollouts, RECIPE, CPU, forest=True, steps_taken=3).finite.all()
    alone = find_diverged_rollouts(critic, rollouts.take(np.asarray([7])), RECIPE, CPU, forest=True, steps_taken=3)
    assert alone.finite.tolist() == [False]


def test_weights_that_were_never_finite_are_not_blamed_on_a_step(tmp_path: Path) -> None:
    critic = build_critic(small_config("Llama"), seed=0)
    (tmp_path / "model").mkdir()
    save_critic(critic, tmp_path / "model", None)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    write_shard(tmp_path / "data" / "a.parquet", readable_rollouts(8, seed=1))
    settings = FitSettings(
        data=[str(tmp_path / "data")],
        out=str(tmp_path / "out"),
        model=str(tmp_path / "model"),
        device="cpu",
        max_steps=1,
    )
    for changes in ({}, {"val_fraction": 0.0}):
        with pytest.raises(CriticTrainError) as caught:
            list(fit(settings.replace(**changes), StopRequest()))
        assert "earlier step" not in caught.value.message
        assert "last checkpoint" not in caught.value.hint


def test_ruined_weights_are_no_rollouts_fault() -> None:
    critic = build_critic(small_config("Llama"), seed=0)
    with torch.no_grad():
        critic.head.bias.fill_(math.nan)
    rollouts = rollouts_of([np.arange(1, 21, dtype=np.int32)], [5])
    suspects = find_diverged_rollouts(critic, rollouts, RECIPE, CPU, forest=True, steps_taken=3)
    assert suspects.reason == "the weights themselves are no longer finite: an earlier step ruined them"
    suspects = find_diverged_rollouts(critic, rollouts, RECIPE, CPU, forest=True, steps_taken=0)
    assert suspects.reason == "the weights themselves are not finite, before any step was taken"
    assert not suspects.finite.any()


def test_a_vanished_shard_and_a_full_disk_do_not_hide_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from critic_train.training import divergence

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(divergence, "_write", full)
    going = fit(settings_for(folder, tmp_path / "out"), StopRequest())
    next(event for event in going if isinstance(event, RunStarted))
    (folder / "b.parquet").unlink()
    with pytest.raises(DivergedError) as caught:
        list(going)
    assert "not kept" in caught.value.message
    assert "No space left on device" in caught.value.message
    assert f"{folder / 'b.parquet'}, row 6" in caught.value.message
