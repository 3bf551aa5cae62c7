from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from support import branching_rollouts, small_config

from critic_train.errors import ModelError
from critic_train.layers import attention, sdpa_kernels
from critic_train.layers.attention import TREE_ATTENTION
from critic_train.layers.sdpa_kernels import SdpaKernel
from critic_train.model import selfcheck, tiles
from critic_train.model.compute import Compute
from critic_train.model.microbatches import predict_values
from critic_train.model.selfcheck import choose_packing, select_packing
from critic_train.model.trial import use_stock_attention
from critic_train.settings import ComputeSettings
from critic_train.weights.loading import build_critic

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


MOE = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
LATENT = {
    **MOE,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
}
CHUNKED = {
    "head_dim": 16,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 64,
    "attention_chunk_size": 16,
    "no_rope_layers": [1, 0],
    "floor_scale": 8,
    "attn_scale": 0.5,
}
VARIANTS = {
    "GptOss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "Gemma2": {"head_dim": 16, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 1, "sliding_window": 8},
    "DeepseekV3": LATENT,
    "DeepseekV2": {**LATENT, "topk_method": "greedy"},
    "Glm4MoeLite": LATENT,
    "Llama4Text": CHUNKED,
}


@pytest.mark.parametrize("family", VARIANTS)
def test_variants_of_attention_share_prefixes(family):
    """Values in micro-batches of many rollouts, and alone by transformers' own attention."""
    critic = build_critic(small_config(family, **VARIANTS[family]), seed=0)
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
        for name, parameter in critic.trunk.named_parameters():
            if "q_" in name or "k_" in name or "sinks" in name:  # attention that is not all the same everywhere
                parameter.mul_(20.0)
    rollouts = branching_rollouts()
    alone = values_alone(critic, rollouts)
    choice = choose_packing(critic, rollouts, "auto", positions=500)
    assert choice.forest, choice.reason
    assert choice.narrowed
    forest = predict_values(critic, rollouts, CPU, forest=True)
    assert np.abs(forest - alone).max() <= 1e-5 * np.abs(alone).max()


def values_alone(critic, rollouts):
    use_stock_attention(critic)
    values = np.zeros(len(rollouts.input_ids), dtype=np.float32)
    with torch.no_grad():
        for start, stop in pairwise(rollouts.offsets.tolist()):
            ids = torch.from_numpy(rollouts.input_ids[start:stop].astype(np.int64))
            hidden = critic.trunk(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            values[start + 1 : stop] = critic.head(hidden)[:-1]
    return np.where(rollouts.response_mask, values, 0.0)


def test_recurrent_layers_that_are_not_known_fall_back_and_say_which():
    critic = build_critic(small_config("RecurrentGemma", head_dim=16, num_hidden_layers=3), seed=0)
    choice = choose_packing(critic, branching_rollouts(), "auto")
    assert not choice.forest
    assert "RecurrentGemmaRglru): hidden states differ by" in choice.reason
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    rollouts = branching_rollouts()
    alone = values_alone(critic, rollouts)
    together = predict_values(critic, rollouts, CPU, forest=False)
    assert np.abs(together - alone).max() <= 1e-5 * np.abs(alone).max()
    with pytest.raises(ModelError, match="cannot be laid out as a forest"):
        choose_packing(critic, branching_rollouts(), "forest")


def test_a_difference_far_below_a_thousandth_is_seen(monkeypatch):
    """A state of Mamba that ran on from one rollout into the next passed once, at 1e-4 where rounding gives 1e-6."""
    forward = transformers.models.llama.modeling_llama.LlamaMLP.forward

    def leaking(mlp, states):
        output = forward(mlp, states)
        return output + 1e-4 * torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", leaking)
    critic = build_critic(small_config("Llama"), seed=0)
    choice = choose_packing(critic, branching_rollouts(), "auto")
    assert not choice.forest
    assert choice.difference < 1e-3


@pytest.mark.parametrize("no_rope_layers", [[0, 1], [1, 0]])  # in the last layer, all but few positions are read
def test_what_depends_on_the_place_in_a_long_row_is_seen_on_as_many_as_a_micro_batch_has(no_rope_layers, monkeypatch):
    """Llama-4's temperature, were it left at the place in the row: it is the same up to 8192 places there."""
    monkeypatch.setattr(attention, "_tunes_by_place", lambda module: False)
    config = small_config("Llama4Text", **{**CHUNKED, "floor_scale": 600, "no_rope_layers": no_rope_layers})
    critic = build_critic(config, seed=0)
    assert choose_packing(critic, branching_rollouts(), "auto", positions=0).forest
    choice = choose_packing(critic, branching_rollouts(), "auto", positions=2000)
    assert not choice.forest
    assert "differ by" in choice.reason


def test_an_architecture_whose_code_fails_gets_rows_with_the_true_reason(monkeypatch):
    def failing(*arguments, **keywords):
        raise RuntimeError("queries and keys of other sizes")

    monkeypatch.setattr(sdpa_kernels.CpuFlashKernel, "__call__", failing)
    critic = build_critic(small_config("Llama"), seed=0)
    choice = choose_packing(critic, branching_rollouts(), "auto")
    assert not choice.forest
    assert "code fails on it (RuntimeError: queries and keys of other sizes)" in choice.reason
    assert predict_values(critic, branching_rollouts(), CPU, forest=False) is not None


def test_rows_that_influence_each_other_go_through_the_model_one_at_a_time(monkeypatch):
    critic = build_critic(small_config("Bloom"), seed=0)
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    mlp = type(critic.trunk.h[0].mlp)
    forward = mlp.forward

    def influenced(module, states, residual):
        return forward(module, states, residual) * (1 + 0.1 * states.shape[0])  # by the number of rows

    monkeypatch.setattr(mlp, "forward", influenced)
    rollouts = branching_rollouts()
    alone = values_alone(critic, rollouts)
    compute = replace(CPU)
    choice, messages = select_packing(critic, rollouts, ComputeSettings(), compute)
    assert not choice.forest
    assert compute.one_row
    assert "bloom computes one rollout at a time: in padded rows, hidden states differ by" in messages[-1]
    values = predict_values(critic, rollouts, compute, forest=False)
    assert np.abs(values - alone).max() <= 1e-6 * np.abs(alone).max()


def test_states_that_are_not_finite_are_refused_as_such():
    critic = build_critic(small_config("Llama"), seed=0)
    with torch.no_grad():
        critic.trunk.layers[0].mlp.up_proj.weight[0] = torch.nan
    with pytest.raises(ModelError, match="hidden states that are not finite"):
        choose_packing(critic, branching_rollouts(), "auto")


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 24,
}


@pytest.mark.parametrize("packing", ["auto", "rows"])
@pytest.mark.parametrize("max_tokens", [60, 10_000])
def test_rollouts_on_both_sides_of_the_original_context_do_not_influence_each_other(packing, max_tokens):
    critic = build_critic(
        small_config("Phi3", rope_parameters=LONGROPE, original_max_position_embeddings=24, num_key_value_heads=4), 0
    )
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    rollouts = branching_rollouts()
    assert 0 < int((rollouts.lengths > 24).sum()) < len(rollouts)
    alone = values_alone(critic, rollouts)
    compute = replace(CPU, max_tokens=max_tokens)
    choice, messages = select_packing(critic, rollouts, ComputeSettings(packing=packing), compute)
    assert (choice.forest, messages) == (packing == "auto", [])
    values = predict_values(critic, rollouts, compute, forest=choice.forest)
    assert np.abs(values - alone).max() <= 1e-5 * np.abs(alone).max()


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
    assert "differ by" in choice.reason
    assert "where rounding gives" in choice.reason


def test_a_model_that_looks_ahead_is_refused():
    critic = build_critic(small_config("Bert"), seed=0)
    with pytest.raises(ModelError, match="bert looks ahead"):
        choose_packing(critic, branching_rollouts(), "auto")


def test_a_model_whose_own_code_fails_is_refused_with_what_it_said():
    # Latent attention has as many heads of keys as of queries: with half of them transformers' own attention fails.
    critic = build_critic(small_config("DeepseekV3", num_attention_heads=4, num_key_value_heads=2), seed=0)
    with pytest.raises(ModelError, match=r"deepseek_v3 cannot compute a rollout alone, .*RuntimeError") as caught:
        choose_packing(critic, branching_rollouts(), "auto")
    assert "config.json" in caught.value.hint


def test_long_rollouts_are_tried_in_tiles_which_are_gone_afterwards(monkeypatch):
    """What MLPs hold of all positions at once would be the most of all that the passes hold."""
    rollouts, most = branching_rollouts(), []
    monkeypatch.setattr(tiles, "SMALLEST_TILE", 8)
    monkeypatch.setattr(tiles, "TRIED_TOKENS", 5)
    for long in (10**6, 20):
        monkeypatch.setattr(selfcheck, "LONG", long)
        critic = build_critic(
            small_config("Llama", hidden_size=8, num_attention_heads=2, num_key_value_heads=1), seed=0
        )
        seen = []
        critic.trunk.layers[0].mlp.up_proj.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output.shape[1])
        )
        choice, _ = select_packing(critic, rollouts, ComputeSettings(), replace(CPU))
        assert choice.forest
        assert choice.narrowed
        most.append(max(seen))
        assert not any("forward" in vars(module) for layer in critic.trunk.layers for module in layer.children())
    assert most[0] > 100
    assert most[1] <= 8


def test_no_rollout_but_the_longest_is_tried_beyond_a_length(monkeypatch):
    monkeypatch.setattr(selfcheck, "LONG", 10)
    critic = build_critic(small_config("Llama"), seed=0)
    rollouts = branching_rollouts(seed=1)
    tried = []

    def trying(critic, rollouts, *args, **kwargs):
        tried.append(rollouts)
        return choose_packing(critic, rollouts, *args, **kwargs)

    monkeypatch.setattr(selfcheck, "choose_packing", trying)
    choice, _ = select_packing(critic, rollouts, ComputeSettings(), replace(CPU))
    longest = int(rollouts.lengths.max())
    assert choice.forest
    assert sorted(tried[0].lengths)[-2:] == [10, longest]
    assert (np.sort(tried[0].lengths)[:-1] == np.minimum(np.sort(rollouts.lengths)[:-1], 10)).all()
