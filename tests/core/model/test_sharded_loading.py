"""What ranks load is what one process wrote, and none holds all of it."""

import os

import pytest
import torch
from rank_work import (
    FAMILIES,
    critic_of,
    load_and_measure,
    load_and_save,
)
from ranks import on_ranks
from support import small_config

from critic_train.model.loading import build_critic
from critic_train.model.saving import save_critic
from critic_train.model.selfcheck import use_stock_attention
from critic_train.training.optimizer import build_optimizer, save_optimizer


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
