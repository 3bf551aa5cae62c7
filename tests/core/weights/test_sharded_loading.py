"""What ranks load is what one process wrote, and none holds all of it."""

import json
import os

import pytest
import torch
from architectures import save_multimodal
from rank_work import (
    FAMILIES,
    critic_of,
    load_and_measure,
    load_and_save,
    load_and_save_new,
)
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from support import small_config
from transformers import AutoModelForCausalLM

from critic_train.model.selfcheck import use_stock_attention
from critic_train.training.optimizer import build_optimizer, save_optimizer
from critic_train.weights.loading import build_critic, load_critic, read_model
from critic_train.weights.saving import save_critic


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


@pytest.mark.parametrize("name", ["Qwen3.5", "Qwen3.5-MoE", "InternVL 3"])
def test_of_a_multimodal_directory_ranks_write_what_one_process_writes(name, tmp_path):
    """Qwen3.5's vision weights pass through, of its mixture the experts are stored one by one."""
    base, one, many = tmp_path / "base", tmp_path / "one", tmp_path / "many"
    save_multimodal(name, base)
    (base / "preprocessor_config.json").write_text("{}")
    for folder in (one, many):
        folder.mkdir()
    save_critic(load_critic(read_model(base)), one, base)
    assert on_ranks(2, load_and_save_new, str(base), str(many)) == [None, None]
    assert {p.name for p in many.iterdir()} == {p.name for p in one.iterdir()}
    for file in one.iterdir():
        assert (many / file.name).read_bytes() == file.read_bytes(), file.name


def test_heads_that_are_folded_and_files_beside_the_model_reach_all_ranks(tmp_path):
    base, one, many = tmp_path / "base", tmp_path / "one", tmp_path / "many"
    AutoModelForCausalLM.from_config(small_config("Llama")).save_pretrained(base)
    head = {"v_head.summary.weight": torch.full((1, 64), 1.5), "v_head.summary.bias": torch.tensor([4.0])}
    save_file(head, base / "value_head.safetensors")
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(raw | {"mean": 3.0, "std": 2.0}))
    for folder in (one, many):
        folder.mkdir()
    save_critic(load_critic(read_model(base)), one, base)
    assert on_ranks(2, load_and_save_new, str(base), str(many)) == [None, None]
    assert load_file(many / "model.safetensors")["score.bias"].tolist() == [0.5]
    assert (many / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()


def test_a_rank_that_meets_a_number_that_is_not_finite_ends_all(tmp_path):
    AutoModelForCausalLM.from_config(small_config("Llama")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][-1, 5] = float("nan")  # in the rows of the last rank
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    answers = on_ranks(2, load_and_save_new, str(tmp_path), str(tmp_path / "out"))
    assert any("layers.1.mlp.up_proj.weight" in str(answer) for answer in answers)


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
