"""Mixtures of experts, which transformers stores in another form than it holds: written a layer at a time."""

import json
from pathlib import Path

import pytest
import torch
from rank_work import expert_critic, save_layer_by_layer
from ranks import on_ranks
from safetensors.torch import load_file

from critic_train.model.critic import Critic
from critic_train.weights.loading import load_critic, read_model
from critic_train.weights.saving import save_critic

FILE_BYTES = 40_000


@pytest.fixture(params=["Mixtral", "Qwen3Moe", "DeepseekV3"])
def family(request) -> str:
    return request.param


def saved_alone(folder: Path, critic: Critic) -> Path:
    folder.mkdir()
    save_critic(critic, folder, None)
    return folder


def test_ranks_write_what_one_process_writes_and_hold_a_layer_at_a_time(family, tmp_path):
    critic = expert_critic(family)
    alone, ours = saved_alone(tmp_path / "alone", critic), tmp_path / "ours"
    ours.mkdir()
    most, other = on_ranks(2, save_layer_by_layer, family, str(ours), 10**9)
    assert other == 0  # rank 0 alone needs what comes out
    assert most == max(sum(t.numel() for t in layer.state_dict().values()) for layer in critic.trunk.layers)
    assert {file.name for file in ours.iterdir()} == {file.name for file in alone.iterdir()}
    for file in alone.iterdir():
        assert (ours / file.name).read_bytes() == file.read_bytes(), file.name


def test_many_files_hold_the_same_and_load(family, tmp_path):
    critic = expert_critic(family)
    alone, ours = saved_alone(tmp_path / "alone", critic), tmp_path / "ours"
    ours.mkdir()
    on_ranks(2, save_layer_by_layer, family, str(ours), FILE_BYTES)
    parts = {file.name: load_file(file) for file in ours.glob("*.safetensors")}
    assert len(parts) > 3
    assert all(len(part) == 1 or sum(4 * t.numel() for t in part.values()) <= FILE_BYTES for part in parts.values())
    index = json.loads((ours / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {name: file for file, part in parts.items() for name in part}
    expected = load_file(alone / "model.safetensors")
    assert index.keys() == expected.keys()
    assert all(torch.equal(parts[file][name], expected[name]) for name, file in index.items())
    loaded = load_critic(read_model(ours)).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in critic.state_dict().items())


def test_what_needs_more_than_a_layer_is_gathered_whole(tmp_path):
    critic = expert_critic("Mixtral")
    alone, ours = saved_alone(tmp_path / "alone", critic), tmp_path / "ours"
    ours.mkdir()
    most, _ = on_ranks(2, save_layer_by_layer, "Mixtral", str(ours), 10**9, False)
    assert most >= sum(p.numel() for p in critic.trunk.parameters())
    assert (ours / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
