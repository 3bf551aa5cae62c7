"""Runs of a critic with recurrent layers, in the shape of Qwen3.5: a forest for the whole life of a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ranks
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from support import StopAfter, readable_rollouts, small_config, write_shard
from transformers import AutoModel

from critic_train.events import Event, Notice, Progress
from critic_train.model import sequence_sharing
from critic_train.model.selfcheck import PackingChoice, use_stock_attention
from critic_train.predict.predict import predict
from critic_train.run.checkpoint import checkpoints
from critic_train.settings import FitSettings, PredictSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit
from critic_train.training.trainer import Trainer
from critic_train.weights.loading import build_critic
from critic_train.weights.saving import save_critic

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hybrid")
    write_shard(folder / "data" / "a.parquet", readable_rollouts(16, seed=1))
    (folder / "model").mkdir()
    save_critic(build_critic(small_config("Qwen3_5Text", **SHAPE), seed=0), folder / "model", None)
    return folder


def settings_for(folder: Path, out: Path, **changes: object) -> FitSettings:
    chosen: dict[str, object] = {
        "data": [str(folder / "data")],
        "model": str(folder / "model"),
        "out": str(out),
        "batch_size": 16,
        "max_tokens": 120,
        "max_steps": 6,
        "checkpoint_every": 2,
        "eval_every": 3,
        "lr": 1e-3,
        "val_fraction": 0.2,
        "device": "cpu",
        "no_report": True,
    }
    return FitSettings(**(chosen | changes))  # type: ignore[arg-type]


def run(settings: FitSettings, stop: StopRequest | None = None) -> list[Event]:
    return list(fit(settings, stop or StopRequest()))


def notices(events: list[Event]) -> str:
    return "\n".join(event.message for event in events if isinstance(event, Notice))


def losses(out: Path) -> list[float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["value_loss"] for record in records if record["event"] == "step"]


def end_of(out: Path) -> dict[str, bytes]:
    last = checkpoints(out / "checkpoints")[-1]
    files = [last / "model.safetensors", last / "optimizer.safetensors", out / "metrics.jsonl"]
    return {path.name: path.read_bytes() for path in files} | {"step": last.name.encode()}


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    events = run(settings_for(folder, out))
    assert "padded rows" not in notices(events)
    assert json.loads((out / "run.json").read_text())["resolved"]["packing"] == "forest"
    return out


def test_a_stopped_run_ends_as_the_undisturbed_one(trained, folder, tmp_path):
    run(settings_for(folder, tmp_path), StopAfter(looks=20))
    assert not (tmp_path / "result.json").exists()
    run(settings_for(folder, tmp_path))
    assert end_of(tmp_path) == end_of(trained)


def test_a_run_that_began_with_padded_rows_goes_on_with_them(folder, tmp_path, monkeypatch):
    """As one of a version that did not lay out recurrent layers as trees: its rounding is that of rows."""

    def rows_only(critic: Any, *_: Any, **__: Any) -> tuple[PackingChoice, list[str]]:
        use_stock_attention(critic)
        return PackingChoice(forest=False), []

    with monkeypatch.context() as earlier:
        earlier.setattr(sequence_sharing, "select_packing", rows_only)
        run(settings_for(folder, tmp_path / "whole"))
        run(settings_for(folder, tmp_path / "parts"), StopAfter(looks=20))
    run(settings_for(folder, tmp_path / "parts"))
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["resolved"]["packing"] == "rows"
    assert end_of(tmp_path / "parts") == end_of(tmp_path / "whole")


def predicted(folder: Path, run: Path, to: Path, packing: str) -> np.ndarray:
    settings = PredictSettings(
        data=[str(folder / "data")], model=str(run), to=str(to), device="cpu", packing=packing, max_tokens=200
    )
    list(predict(settings, StopRequest()))
    return np.concatenate([np.asarray(row) for row in pq.read_table(to / "a.parquet")["values"].to_pylist()])


@torch.no_grad()
def by_transformers(folder: Path, checkpoint: Path) -> np.ndarray:
    """Each rollout by itself through AutoModel; the head of the files, written out."""
    trunk = AutoModel.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa").eval()
    head = load_file(checkpoint / "model.safetensors")
    table = pq.read_table(folder / "data" / "a.parquet").to_pydict()
    values = []
    for ids, mask in zip(table["input_ids"], table["response_mask"], strict=True):
        states = trunk(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        value = states @ head["score.weight"].float().flatten() + head["score.bias"].float()
        values.append(np.where(mask, np.append(0.0, value[:-1].numpy()), 0.0))
    return np.concatenate(values)


def test_values_in_the_forest_are_those_of_rows_and_of_transformers_alone(trained, folder, tmp_path):
    forest = predicted(folder, trained, tmp_path / "forest", "forest")
    alone = by_transformers(folder, checkpoints(trained / "checkpoints")[-1])
    assert alone[alone != 0].std() > 0.01
    limit = 1e-5 * np.abs(alone).max()
    assert np.abs(forest - predicted(folder, trained, tmp_path / "rows", "rows")).max() <= limit
    assert np.abs(forest - alone).max() <= limit


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["layer", "selective"])
def test_activations_are_computed_again_and_the_run_is_the_same(kind, trained, folder, tmp_path):
    run(settings_for(folder, tmp_path, activation_checkpointing=kind))
    assert losses(tmp_path) == pytest.approx(losses(trained), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("train", ["last-1", "last-2"])
def test_kept_states_give_the_same_run(train, folder, tmp_path, monkeypatch):
    """last-2 begins within the recurrent layers."""
    events = run(settings_for(folder, tmp_path / "kept", train=train))
    assert any(isinstance(event, Progress) and "frozen" in event.stage for event in events)
    monkeypatch.setattr(Trainer, "_cache_states", lambda self: iter(()))
    run(settings_for(folder, tmp_path / "again", train=train))
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "again"), rel=1e-4)


@pytest.mark.slow
def test_adapters_are_folded_into_what_transformers_loads(folder, tmp_path):
    pytest.importorskip("peft")
    run(settings_for(folder, tmp_path / "run", train="lora", lora_rank=4))
    assert len(set(losses(tmp_path / "run"))) > 1
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    alone = by_transformers(folder, newest)
    forest = predicted(folder, newest, tmp_path / "to", "forest")
    assert np.abs(forest - alone).max() <= 1e-5 * np.abs(alone).max()


@pytest.mark.slow
def test_two_ranks_give_the_loss_curve_of_one(trained, folder, tmp_path):
    ended = on_ranks(2, ranks.fit_run, settings_for(folder, tmp_path))
    assert [end.get("status", end) for end in ended] == ["finished"] * 2
    assert json.loads((tmp_path / "run.json").read_text())["resolved"]["packing"] == "forest"
    assert losses(tmp_path) == pytest.approx(losses(trained), rel=1e-5)
