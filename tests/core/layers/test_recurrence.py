"""Recurrent layers on a tree give each rollout the states and gradients that it has alone in transformers' own code."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import VOCABULARY, rollouts_of, small_config
from transformers.models.qwen3_5 import modeling_qwen3_5

from critic_train.layers import recurrence, tree_states
from critic_train.layers.prefix_tree import build_tree_layout, prefix_order
from critic_train.layers.recurrence import RECURRENCES, recur, share_states
from critic_train.layers.tree_nodes import tree_nodes
from critic_train.layers.tree_states import TreeStates
from critic_train.model.critic import Critic
from critic_train.model.model_input import ModelInput, tree_input
from critic_train.model.selfcheck import use_stock_attention
from critic_train.rollouts import Rollouts
from critic_train.weights.loading import build_critic

DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention"],
}
SCAN = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_expand": 2}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3_5Text": DELTA,
    "Qwen3_5MoeText": {**DELTA, **MIXTURE, "shared_expert_intermediate_size": 32},
    "Qwen3Next": {**DELTA, **MIXTURE, "shared_expert_intermediate_size": 32},
    "OlmoHybrid": {**DELTA, "linear_num_value_heads": 2, "layer_types": ["linear_attention", "full_attention"]},
    "KimiLinear": {
        "layer_types": ["linear_attention", "linear_attention"],
        "linear_num_heads": 2,
        "linear_head_dim": 16,
        "num_key_value_heads": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
    },
    "GraniteMoeHybrid": {
        **SCAN,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
    },
    "NemotronH": {
        "layers_block_type": ["mamba", "mlp", "mamba", "attention"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "expand": 2,
        "chunk_size": 4,
    },
    "FalconH1": {**SCAN, "mamba_d_ssm": 128},
    "Bamba": {**SCAN, "attn_layer_indices": [1]},
    "Zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "mamba_d_state": 8,
        "mamba_ngroups": 2,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "adapter_rank": 8,
    },
    "Mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 2},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Lfm2Moe": {**MIXTURE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Lfm3": {"layer_types": ["conv", "full_attention"]},
    "MiniMax": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "block_size": 4,
        "head_dim": 16,
    },
}


def awkward_rollouts() -> Rollouts:
    """What is hard to get right: see the comments. Convolutions here reach 2 to 6 tokens back."""
    draw = np.random.default_rng(0)

    def tokens(count: int) -> NDArray[np.int32]:
        return draw.integers(1, VOCABULARY, count).astype(np.int32)

    sequences = []
    for length in (1, 2, 41):  # prompts shorter than the convolution, and one longer than a chunk
        prompt = tokens(length)
        response = tokens(9)
        sequences += [
            np.concatenate([prompt, response]),
            np.concatenate([prompt, response[:1], tokens(3)]),  # branches one token on, within the reach
            np.concatenate([prompt, response[:3], tokens(2)]),  # and two tokens on again
            np.concatenate([prompt, response[:4], tokens(1)]),  # nodes of one token
            np.concatenate([prompt, response[:6]]),  # a response that is the start of another
            np.concatenate([prompt, response]),  # the same once more
            np.concatenate([prompt, tokens(37)]),
        ]
    sequences.append(tokens(70))
    prompts = [*np.repeat([1, 2, 41], 7).tolist(), 1]
    return rollouts_of(sequences, prompts)


def critic_of(family: str) -> Critic:
    """With weights that make the recurrence matter: at their usual start it is lost in the residual."""
    critic = build_critic(small_config(family, **FAMILIES[family]), seed=0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in critic.trunk.named_parameters():
            if weight.ndim >= 2:
                scale = 1.0 if "embed" in name else 0.9 * weight.shape[-1] ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=draw) * scale)
            elif "A_log" not in name:
                weight.add_(0.1 * torch.randn(weight.shape, generator=draw))
    return critic


def gradients(critic: Critic, hidden: torch.Tensor, slope: torch.Tensor) -> dict[str, torch.Tensor]:
    critic.zero_grad()
    (hidden * slope).sum().backward()
    return {name: p.grad.clone() for name, p in critic.trunk.named_parameters() if p.grad is not None}


def states_alone(critic: Critic, rollouts: Rollouts, batch: ModelInput) -> torch.Tensor:
    """[M, hidden_size]: every rollout by itself, as transformers computes it."""
    use_stock_attention(critic)
    rows = [
        critic.trunk(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).last_hidden_state[0]
        for ids in np.split(rollouts.input_ids, rollouts.offsets[1:-1])
    ]
    return torch.cat(rows)[torch.from_numpy(batch.response_tokens - 1)]


def compare(family: str) -> None:
    """The figures that are asked for: values to 1e-5 of the largest, gradients to 1e-4 of their norm, in float32."""
    critic = critic_of(family).train()
    rollouts = awkward_rollouts()
    batch = tree_input(rollouts, prefix_order(rollouts), torch.device("cpu"))
    assert batch.computed_tokens < 0.7 * len(rollouts.input_ids)
    slope = torch.randn(
        len(batch.value_index), critic.trunk.config.hidden_size, generator=torch.Generator().manual_seed(2)
    )
    tree = critic.hidden(batch)[batch.value_index]
    on_tree = gradients(critic, tree, slope)
    alone = states_alone(critic, rollouts, batch)
    expected = gradients(critic, alone, slope)
    assert float((tree - alone).detach().abs().max()) <= 1e-5 * float(alone.detach().abs().max())
    assert set(on_tree) == set(expected)
    for name, gradient in expected.items():
        assert float((on_tree[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name


# One of each function; the others are layers of the same.
QUICK = ("Qwen3_5Text", "KimiLinear", "GraniteMoeHybrid", "Zamba2", "Lfm2", "MiniMax")
CASES = [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]


@pytest.mark.parametrize("family", CASES)
def test_states_and_gradients_on_a_tree_are_those_of_the_rollouts_alone(family):
    compare(family)


@pytest.mark.parametrize("family", ["Qwen3_5Text", "Mamba2"])
def test_long_nodes_are_cut_and_ragged_ones_are_batched(family, monkeypatch):
    monkeypatch.setattr(recurrence, "CHUNK", 4)
    monkeypatch.setattr(tree_states, "CHUNK", 4)
    monkeypatch.setattr(tree_states, "LONGEST_NODE", 8)
    compare(family)


def by_sequence(query, key, value, g, beta, cu_seqlens=None, initial_state=None, output_final_state=False, **other):
    """As flash-linear-attention's function is called: one row, in which sequences follow one another."""
    assert output_final_state
    assert query.shape[0] == 1
    outputs, states = [], []
    for number, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        parts = [tensor[:, start:stop] for tensor in (query, key, value, g, beta)]
        output, state = modeling_qwen3_5.torch_chunk_gated_delta_rule(
            *parts[:3],
            g=parts[3],
            beta=parts[4],
            initial_state=None if initial_state is None else initial_state[number : number + 1],
            output_final_state=True,
            use_qk_l2norm_in_kernel=other["use_qk_l2norm_in_kernel"],
        )
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, dim=1), torch.cat(states)


def test_a_function_that_takes_bounds_is_called_once_a_level():
    rollouts = awkward_rollouts()
    layout = build_tree_layout(rollouts, prefix_order(rollouts))
    draw = torch.Generator().manual_seed(0)
    size = len(layout)
    query, key = (torch.randn(1, size, 2, 16, generator=draw, requires_grad=True) for _ in range(2))
    value = torch.randn(1, size, 4, 8, generator=draw, requires_grad=True)
    g, beta = -torch.rand(1, size, 4, generator=draw), torch.rand(1, size, 4, generator=draw)
    calls = []

    def counted(*args, **kwargs):
        calls.append(len(kwargs["cu_seqlens"]) - 1)
        return by_sequence(*args, **kwargs)

    counted.__signature__ = recurrence.inspect.signature(by_sequence)
    how = {"g": g, "beta": beta, "use_qk_l2norm_in_kernel": True, "output_final_state": False}
    results = []
    for function in (counted, modeling_qwen3_5.torch_chunk_gated_delta_rule):
        states = TreeStates(layout, torch.device("cpu"))
        rule = RECURRENCES["torch_chunk_gated_delta_rule"]
        output, state = recur(rule, function, states, query, key, value, **how)
        assert state is None
        gradient = torch.autograd.grad(output.sum(), [query, key, value])
        results.append([output, *gradient])
    nodes = tree_nodes(layout)
    assert calls == np.bincount(nodes.level).tolist()
    for packed, padded in zip(*results, strict=True):
        assert float((packed - padded).detach().abs().max()) <= 1e-5 * float(padded.detach().abs().max())


def test_without_a_plan_a_layer_does_what_it_did():
    critic = critic_of("Qwen3_5Text")
    ids = torch.arange(1, 20)[None]
    shared = critic.trunk(input_ids=ids, use_cache=False).last_hidden_state
    own = modeling_qwen3_5.torch_chunk_gated_delta_rule.__wrapped__
    share_states(critic.trunk)  # again: nothing is wrapped twice
    assert modeling_qwen3_5.torch_chunk_gated_delta_rule.__wrapped__ is own
    modeling_qwen3_5.torch_chunk_gated_delta_rule, ours = own, modeling_qwen3_5.torch_chunk_gated_delta_rule
    try:
        assert torch.equal(critic.trunk(input_ids=ids, use_cache=False).last_hidden_state, shared)
    finally:
        modeling_qwen3_5.torch_chunk_gated_delta_rule = ours


def test_a_layer_that_is_given_some_positions_only_is_refused():
    """On CUDA the index would end the process; the self-check takes the error for what it is."""
    critic = critic_of("Qwen3_5Text")
    rollouts = awkward_rollouts()
    arguments = tree_input(rollouts, prefix_order(rollouts), torch.device("cpu")).trunk_arguments
    size = arguments["input_ids"].shape[1]
    states = torch.randn(1, size - 1, critic.trunk.config.hidden_size)
    with pytest.raises(ValueError, match=f"given {size - 1} of {size} positions"):
        critic.trunk.layers[0].linear_attn(states, tree_plan=arguments["tree_plan"])
