"""A critic in parts: gradients, files and memory are those of one process."""

import json
import os

import pytest
import ranks
import torch
from rank_work import (
    FAMILIES,
    compare_gradients,
    compare_with_less_kept,
    critic_of,
    fill_the_disk,
    load_and_measure,
    load_and_save,
)
from ranks import on_ranks
from safetensors.torch import save_file
from support import small_config

from critic_train.model import sharded_checkpoint as sharded_saving
from critic_train.model.loading import build_critic
from critic_train.model.saving import save_critic
from critic_train.model.selfcheck import use_stock_attention
from critic_train.model.tensor_file import write_tensors
from critic_train.training.optimizer import build_optimizer, save_optimizer


def test_gradients_and_values_are_those_of_one_process_for_any_layout_and_number_of_rollouts():
    found = on_ranks(3, compare_gradients)
    assert [worst for worst in found if isinstance(worst, dict) or max(worst) > 1e-5] == []


@pytest.mark.parametrize("kind", ["layer", "selective"])
def test_activations_are_computed_again_on_every_rank_and_the_gradient_is_the_same(kind):
    for found in on_ranks(2, compare_with_less_kept, kind):
        assert found["worst"] <= 1e-6
        assert found["runs"] == 2.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "layer"])
def test_compiled_layers_give_the_same_gradient_on_every_rank(kind, monkeypatch):
    monkeypatch.setattr(ranks, "PATIENCE_SECONDS", 600.0)  # each rank compiles for half a minute of its own
    for found in on_ranks(2, compare_with_less_kept, kind, True):
        assert found["worst"] <= 1e-5
        assert found["graphs"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_what_ranks_load_and_write_is_byte_for_byte_what_one_process_wrote(family, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    critic = critic_of(family)
    optimizer = build_optimizer(critic, lr=1e-3, head_lr=1e-3, weight_decay=0.0)
    use_stock_attention(critic)
    critic.head(critic.trunk(input_ids=torch.arange(1, 9)[None], use_cache=False).last_hidden_state).sum().backward()
    optimizer.step()
    save_critic(critic, source, None)
    save_optimizer(optimizer, dict(critic.named_parameters()), source)
    (source / "tokenizer.json").write_text("{}")
    found = on_ranks(2, load_and_save, str(source), str(target))
    assert found == [None, None]
    assert {p.name for p in target.iterdir()} == {p.name for p in source.iterdir()}
    for file in source.iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_file_written_tensor_by_tensor_is_the_librarys(tmp_path):
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "b.weight": torch.randn(3, 5, generator=draw),
        "a": torch.randn(7, generator=draw).to(torch.bfloat16),
        "step": torch.tensor([3.0]),
        "é": torch.arange(4),
        "none": torch.zeros(0, 4),
    }
    for name, metadata in (("with", {"format": "pt"}), ("without", None)):
        save_file(tensors, tmp_path / name, metadata=metadata)
        write_tensors(tmp_path / f"{name}-ours", tensors, tensors.__getitem__, metadata)
        assert (tmp_path / f"{name}-ours").read_bytes() == (tmp_path / name).read_bytes()


def test_a_full_disk_on_rank_0_leaves_no_rank_behind(tmp_path):
    assert on_ranks(2, fill_the_disk, str(tmp_path)) == ["No space left on device"] * 2


def test_large_models_are_split_into_files_as_transformers_splits_them(tmp_path, monkeypatch):
    critic = critic_of("Llama")
    tensors = dict(critic.trunk.state_dict())
    size = sum(t.numel() * 4 for t in tensors.values()) // 3
    critic.trunk.save_pretrained(tmp_path, max_shard_size=size)
    monkeypatch.setattr(sharded_saving, "MAX_SHARD_BYTES", size)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    ours = {name: file for file, names in sharded_saving.split(tensors).items() for name in names}
    assert ours == index["weight_map"]


@pytest.mark.slow
def test_no_rank_holds_the_whole_model_while_it_loads(tmp_path):
    """A model of 386 MB on 4 ranks: each grows by its quarter and little more."""
    config = small_config("Llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, vocab_size=2048)
    critic = build_critic(config, seed=0)
    save_critic(critic, tmp_path, None)
    whole_bytes = sum(p.numel() * 4 for p in critic.parameters())
    del critic
    for part, grown in on_ranks(4, load_and_measure, str(tmp_path)):
        assert part <= 0.26 * whole_bytes
        assert grown <= 0.4 * whole_bytes
    assert os.path.getsize(tmp_path / "model.safetensors") > 3e8
