"""What --model names, and which rows it can read."""

import pytest
from support import small_config

from critic_train.errors import ModelError
from critic_train.weights.first_pass import critic_source, limits_of
from critic_train.weights.loading import build_critic
from critic_train.weights.saving import save_critic


def test_a_critic_is_read_and_one_without_a_head_is_refused(tmp_path):
    config = small_config("Qwen2")
    critic = build_critic(config, seed=0)
    save_critic(critic, tmp_path / "critic", None)
    source = critic_source(tmp_path / "critic")
    limits = limits_of([source])
    assert (limits.vocab_size, limits.max_length) == (config.vocab_size, config.max_position_embeddings)
    critic.trunk.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="has no value head: it predicts no values"):
        critic_source(tmp_path / "base")
