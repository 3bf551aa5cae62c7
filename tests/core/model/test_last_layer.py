"""The last layer computes only what is read, and nothing else changes; the yardsticks are in test_exactness."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support import rollouts_of, small_config

from critic_train.layers.prefix_tree import prefix_order
from critic_train.model import last_layer
from critic_train.model.compute import Compute
from critic_train.model.memory import checkpoint_activations
from critic_train.model.microbatches import predict_values
from critic_train.model.model_input import tree_input
from critic_train.model.selfcheck import choose_packing
from critic_train.model.trial import Trial
from critic_train.weights.loading import build_critic

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


@pytest.mark.parametrize(
    "family", ["Llama", "Qwen3", "Mistral", "Olmo2", "GPTNeoX", "Granite", "Cohere", "Phi3", "OPT"]
)
def test_values_are_those_of_a_whole_last_layer(family):
    changes = {
        "Mistral": {"sliding_window": 40},
        "Qwen3": {"head_dim": 16},
        "Granite": {"residual_multiplier": 0.3},
        "OPT": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    }.get(family, {})
    critic = critic_with_a_head(family, **changes)
    rollouts = long_prompts()
    assert choose_packing(critic, rollouts, "auto").narrowed
    narrow = predict_values(critic, rollouts, CPU, forest=True)
    last_layer.restore_last_layer(critic.trunk)
    whole = predict_values(critic, rollouts, CPU, forest=True)
    assert np.abs(narrow - whole).max() <= 1e-5 * np.abs(whole).max()


def test_a_layer_that_takes_its_output_by_the_number_of_all_positions_computes_all_of_them():
    """GPT-2's trunk gives its output the shape of its input."""
    critic = critic_with_a_head("GPT2", n_embd=64, n_layer=2, n_head=4)
    choice = choose_packing(critic, long_prompts(), "auto")
    assert choice.forest
    assert not choice.narrowed
    assert "forward" not in vars(critic.trunk.h[-1])


def test_a_layer_whose_queries_need_other_positions_is_found_out(monkeypatch):
    """What is computed at the needed positions alone is another thing there: the whole layer is kept."""
    critic = critic_with_a_head()
    attention = critic.trunk.layers[-1].self_attn
    forward = attention.q_proj.forward
    # As a short convolution over the queries does.
    monkeypatch.setattr(attention.q_proj, "forward", lambda states: forward(states + states.mean(1, keepdim=True)))
    monkeypatch.setattr(Trial, "_check_causal", lambda _: None)
    choice = choose_packing(critic, long_prompts(), "auto")
    assert not choice.narrowed


@pytest.mark.parametrize("kind", ["layer", "selective"])
def test_a_narrowed_layer_whose_activations_are_computed_again_has_the_same_gradient(kind):
    critic = critic_with_a_head("Qwen3", head_dim=16).train()
    rollouts = long_prompts()
    assert choose_packing(critic, rollouts, "auto").narrowed

    def gradient():
        critic.zero_grad(set_to_none=True)
        critic(tree_input(rollouts, prefix_order(rollouts), CPU.device)).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in critic.parameters()])

    expected = gradient()
    checkpoint_activations(critic, kind)
    assert float((gradient() - expected).norm() / expected.norm()) <= 1e-6
