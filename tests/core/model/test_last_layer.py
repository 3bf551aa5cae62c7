"""The last layer computes only what is read, and nothing else changes; the yardsticks are in test_exactness."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support import rollouts_of, small_config

from critic_train.layers.prefix_tree import prefix_order
from critic_train.model import last_layer
from critic_train.model.compute import Compute
from critic_train.model.last_layer import skip_unread_positions
from critic_train.model.loading import build_critic
from critic_train.model.microbatches import predict_values
from critic_train.model.model_input import tree_input
from critic_train.model.selfcheck import choose_packing

CPU = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=10_000)
PROMPT = 150


def long_prompts():
    """Two prompts, two responses each, with an observation of 80 tokens in one of them."""
    draw = np.random.default_rng(0)
    sequences = []
    for _ in range(2):
        prompt = draw.integers(1, 128, PROMPT)
        sequences += [np.concatenate([prompt, draw.integers(1, 128, 120)]).astype(np.int32) for _ in range(2)]
    rollouts = rollouts_of(sequences, [PROMPT] * 4)
    mask = rollouts.response_mask.copy()
    mask[PROMPT + 10 : PROMPT + 90] = False
    return replace(rollouts, response_mask=mask)


def critic_with_a_head(family="Llama", **changes):
    critic = build_critic(small_config(family, **changes), seed=0)
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    return critic


def positions_through_the_last_mlp(critic, batch):
    seen = []
    handle = critic.trunk.layers[-1].mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    critic(batch)
    handle.remove()
    return seen[0]


def test_prompts_and_observations_do_not_go_through_the_last_mlp():
    critic = critic_with_a_head()
    rollouts = long_prompts()
    assert choose_packing(critic, rollouts, "auto").forest
    batch = tree_input(rollouts, prefix_order(rollouts), CPU.device)
    # A prompt's last token and all but the last of each response of 120, less the 80 of the observation; the prefix
    # that one rollout of a prompt computes is computed for both.
    assert positions_through_the_last_mlp(critic, batch) == 2 + 4 * 119 - 80
    assert batch.computed_tokens == 2 * PROMPT + 4 * 120


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral", "SmolLM3"])
def test_values_are_those_of_a_whole_last_layer(family):
    changes = {"sliding_window": 40} if family == "Mistral" else {"head_dim": 16} if family == "Qwen3" else {}
    critic = critic_with_a_head(family, **changes)
    rollouts = long_prompts()
    assert choose_packing(critic, rollouts, "auto").forest
    assert "forward" in vars(critic.trunk.layers[-1])
    narrow = predict_values(critic, rollouts, CPU, forest=True)
    last_layer.restore_last_layer(critic.trunk)
    whole = predict_values(critic, rollouts, CPU, forest=True)
    assert np.abs(narrow - whole).max() <= 1e-5 * np.abs(whole).max()


def test_a_layer_of_another_build_is_left_alone():
    assert not skip_unread_positions(critic_with_a_head("Olmo2").trunk)
    assert not skip_unread_positions(critic_with_a_head("GPTNeoX").trunk)


def test_a_layer_that_looks_alike_but_computes_otherwise_is_found_out():
    """Granite's layers have the parts of Llama's, and scale what they add."""
    critic = critic_with_a_head("Granite", residual_multiplier=0.3)
    assert choose_packing(critic, long_prompts(), "auto").forest
    assert "forward" not in vars(critic.trunk.layers[-1])
