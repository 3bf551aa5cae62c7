import numpy as np
import pytest
import torch
from support import branching_rollouts, small_config

from critic_train.errors import ModelError
from critic_train.layers import sdpa_kernels
from critic_train.layers.attention import TREE_ATTENTION
from critic_train.layers.sdpa_kernels import SdpaKernel
from critic_train.model.compute import Compute
from critic_train.model.loading import build_critic
from critic_train.model.microbatches import predict_values
from critic_train.model.selfcheck import choose_packing

CPU = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=10_000)


def test_a_plain_decoder_gets_a_forest():
    critic = build_critic(small_config("Qwen3"), seed=0)
    choice = choose_packing(critic, branching_rollouts(), "auto")
    assert choice.forest
    assert choice.difference < 1e-5
    assert critic.trunk.config._attn_implementation == TREE_ATTENTION


def test_rows_when_asked_for():
    critic = build_critic(small_config("Llama"), seed=0)
    assert not choose_packing(critic, branching_rollouts(), "rows").forest
    assert critic.trunk.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("family", "why"), [("Gemma2", "softcap"), ("GptOss", "s_aux"), ("Qwen3_5Text", "differ by")])
def test_an_architecture_that_cannot_share_falls_back_and_says_why(family, why):
    critic = build_critic(small_config(family), seed=0)
    choice = choose_packing(critic, branching_rollouts(), "auto")
    assert not choice.forest
    assert why in choice.reason
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    rollouts = branching_rollouts()
    together = predict_values(critic, rollouts, CPU, forest=False)
    alone = np.concatenate(
        [predict_values(critic, rollouts.take(np.asarray([i])), CPU, forest=False) for i in range(len(rollouts))]
    )
    assert np.abs(together - alone).max() <= 1e-5 * np.abs(alone).max()
    with pytest.raises(ModelError, match="cannot be laid out as a forest"):
        choose_packing(critic, branching_rollouts(), "forest")


@pytest.mark.parametrize("family", ["Bloom", "GPTJ", "Falcon"])
def test_an_architecture_with_attention_of_its_own_gets_rows(family):
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 16} if family == "GPTJ" else {}
    critic = build_critic(small_config(family, **shape), seed=0)
    assert not choose_packing(critic, branching_rollouts(), "auto").forest
    assert predict_values(critic, branching_rollouts(), CPU, forest=False) is not None


def test_attention_that_sees_too_much_is_caught(monkeypatch):
    """The check itself: with a mask that hides nothing, a branch sees its own future."""
    monkeypatch.setattr(sdpa_kernels, "cpu_flash_available", lambda _: False)
    monkeypatch.setattr(SdpaKernel, "mask", lambda _, queries, keys, __: torch.ones(queries, keys, dtype=torch.bool))
    critic = build_critic(small_config("Llama"), seed=0)
    choice = choose_packing(critic, branching_rollouts(), "auto")
    assert not choice.forest
    assert choice.difference > 0.01


def test_a_model_that_looks_ahead_is_refused():
    critic = build_critic(small_config("Bert"), seed=0)
    with pytest.raises(ModelError, match="bert looks ahead"):
        choose_packing(critic, branching_rollouts(), "auto")
