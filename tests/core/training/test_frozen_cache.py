"""A frozen trunk: what is kept gives what computing it again gives, whatever stops in between."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import StopAfter, readable_rollouts, small_config, write_shard
from transformers import AutoModelForCausalLM

from critic_train.errors import ConfigError, ModelError
from critic_train.events import Event, Notice, Progress, RunEnded
from critic_train.model.critic import Critic
from critic_train.run.checkpoint import checkpoints
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit
from critic_train.training.trainer import Trainer

FAMILIES = ("Llama", "Qwen3", "Mistral", "GPTNeoX")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rollouts")
    write_shard(folder / "a.parquet", readable_rollouts(16, seed=1))
    return folder


def base_of(family: str, folder: Path, layers: int = 3) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(small_config(family, num_hidden_layers=layers)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return base_of("Llama", tmp_path_factory.mktemp("base"))


def run(
    shards: Path, out: Path, model: Path, train: str, stop: StopRequest | None = None, **more: object
) -> list[Event]:
    settings = {"data": [str(shards)], "out": str(out), "model": str(model), "train": train, "device": "cpu"}
    settings |= {"batch_size": 16, "max_tokens": 120, "epochs": 2, "eval_every": 4, "lr": 1e-3, "val_fraction": 0.2}
    settings |= {"no_report": True, "head_init": "mean"}
    return list(fit(FitSettings(**(settings | more)), stop or StopRequest()))  # type: ignore[arg-type]


def curve(out: Path) -> list[tuple[str, float]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(record["event"], record.get("value_loss") or record["mse"]) for record in records]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(out / "checkpoints")[-1] / "model.safetensors")


@pytest.mark.parametrize(
    ("train", "packing"), [("head", "forest"), ("head", "rows"), ("last-2", "forest"), ("last-1", "rows")]
)
def test_kept_states_give_the_same_run(train, packing, base, shards, tmp_path, monkeypatch):
    events = run(shards, tmp_path / "kept", base, train, packing=packing)
    assert any(isinstance(e, Progress) and "frozen" in e.stage for e in events)
    monkeypatch.setattr(Trainer, "_cache_states", lambda self: iter(()))
    run(shards, tmp_path / "again", base, train, packing=packing)
    kept, again = curve(tmp_path / "kept"), curve(tmp_path / "again")
    assert [name for name, _ in kept] == [name for name, _ in again]
    assert [loss for _, loss in kept] == pytest.approx([loss for _, loss in again], rel=1e-4)
    assert kept[1][1] != kept[-1][1], "something was learned"


@pytest.mark.parametrize("family", FAMILIES)
def test_other_architectures_keep_states_too(family, shards, tmp_path, monkeypatch):
    base = base_of(family, tmp_path / "base")
    events = run(shards, tmp_path / "kept", base, "last-1", epochs=1)
    assert not [e.message for e in events if isinstance(e, Notice) and "cached states" in e.message]
    monkeypatch.setattr(Trainer, "_cache_states", lambda self: iter(()))
    run(shards, tmp_path / "again", base, "last-1", epochs=1)
    kept, again = curve(tmp_path / "kept"), curve(tmp_path / "again")
    assert [loss for _, loss in kept] == pytest.approx([loss for _, loss in again], rel=1e-4)


@pytest.mark.parametrize(("train", "moving"), [("head", []), ("last-1", ["layers.2.", "norm."])])
def test_only_what_is_trained_moves(train, moving, base, shards, tmp_path):
    run(shards, tmp_path, base, train)
    before, after = load_file(base / "model.safetensors"), weights(tmp_path)
    for name, tensor in before.items():
        if name.startswith("model."):
            moves = any(name.removeprefix("model.").startswith(part) for part in moving)
            assert torch.equal(tensor, after[name]) != moves, name
    assert after["score.weight"].abs().sum() > 0


@pytest.mark.parametrize(
    ("train", "looks"), [("head", 2), ("head", 38), ("head", 40), ("last-1", 9), ("last-1", 60), ("lora", 50)]
)
def test_a_stop_anywhere_changes_nothing(train, looks, base, shards, tmp_path):
    """40 of "head" comes between the last step and the last evaluation, which reads cached states all the same."""
    run(shards, tmp_path / "whole", base, train)
    run(shards, tmp_path / "parts", base, train, StopAfter(looks=looks))
    ended = run(shards, tmp_path / "parts", base, train)[-1]
    assert isinstance(ended, RunEnded)
    assert ended.status in ("finished", "already finished")
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_trunk_whose_layers_are_elsewhere_trains_its_head_only(shards, tmp_path):
    base = base_of("GPT2", tmp_path / "base")
    assert run(shards, tmp_path / "head", base, "head", epochs=1)[-1].status == "finished"
    with pytest.raises(ModelError, match="keeps its layers elsewhere"):
        run(shards, tmp_path / "last", base, "last-1", epochs=1)


def test_more_layers_than_there_are_is_refused(base, shards, tmp_path):
    with pytest.raises(ModelError, match="last-3: llama has 3 layers"):
        run(shards, tmp_path, base, "last-3")


@pytest.mark.parametrize("train", ["last", "last-0", "tail", "last-2x"])
def test_other_words_are_refused(train):
    with pytest.raises(ConfigError, match="--train must be"):
        FitSettings(data=["x"], model="m", train=train)


def test_a_new_transformer_has_nothing_to_freeze():
    with pytest.raises(ConfigError, match="--train head needs --model"):
        FitSettings(data=["x"], train="head")


@pytest.mark.parametrize("packing", ["forest", "rows"])
def test_states_are_kept_in_halves_where_memory_runs_out(packing, base, shards, tmp_path, monkeypatch):
    run(shards, tmp_path / "whole", base, "head", packing=packing, max_tokens=1000)
    hidden, seen = Critic.hidden, []

    def short(self, batch):
        seen.append(batch.computed_tokens)
        if batch.computed_tokens > 250 and batch.cached_states is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(self, batch)

    monkeypatch.setattr(Critic, "hidden", short)
    events = run(shards, tmp_path / "halves", base, "head", packing=packing, max_tokens=1000)
    assert max(seen) > 250
    assert [e.message for e in events if isinstance(e, Notice) and "memory ran out with 1,000 tokens" in e.message]
    whole, halves = curve(tmp_path / "whole"), curve(tmp_path / "halves")
    assert [loss for _, loss in halves] == pytest.approx([loss for _, loss in whole], rel=1e-4)
