"""Adapters start at nothing, fold into plain weights, and are put back as they were."""

import itertools

import numpy as np
import pytest
import torch
from architectures import text_config
from support import branching_rollouts, small_config
from transformers import AutoModelForTokenClassification

from critic_train.errors import ModelError
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.microbatches import predict_values
from critic_train.model.selfcheck import use_stock_attention
from critic_train.weights.loading import build_critic, load_critic, read_model
from critic_train.weights.lora import ADAPTER_FILE, adapter_notice, add_adapters, load_adapters, merged_tensors
from critic_train.weights.saving import loads_for_token_classification, save_critic

pytest.importorskip("peft")
COMPUTE = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=10_000)


def critic_of(family: str) -> Critic:
    critic = build_critic(small_config(family), seed=0)
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    return critic.eval()


def values_of(critic: Critic) -> np.ndarray:
    values = predict_values(critic, branching_rollouts(), COMPUTE, forest=True)
    assert values is not None
    return values


def rows_of(critic: Critic) -> np.ndarray:
    """float32 [M]: the values of response tokens, by padded rows."""
    use_stock_attention(critic)
    values = predict_values(critic, branching_rollouts(), COMPUTE, forest=False)
    assert values is not None
    return values[branching_rollouts().response_mask]


def logits_alone(model: torch.nn.Module) -> np.ndarray:
    """float32 [M]: the same from another program's model, one rollout at a time."""
    rollouts, values = branching_rollouts(), []
    for start, stop in itertools.pairwise(rollouts.offsets.tolist()):
        ids = torch.from_numpy(rollouts.input_ids[start:stop].astype(np.int64))[None]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :, 0].numpy()
        values.append(logits[np.flatnonzero(rollouts.response_mask[start:stop]) - 1])
    return np.concatenate(values)


def moved(critic: Critic) -> Critic:
    """The critic with adapters that do something."""
    add_adapters(critic, rank=4, alpha=6.0, seed=3)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in critic.trunk.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.05, generator=draw)
    return critic


def test_new_adapters_change_no_value_and_leave_the_global_generator_alone():
    critic = critic_of("Llama")
    before, state = values_of(critic), torch.random.get_rng_state()
    add_adapters(critic, rank=4, alpha=6.0, seed=3)
    assert np.array_equal(values_of(critic), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    trained = {name for name, p in critic.named_parameters() if p.requires_grad}
    assert {name for name in trained if ".lora_" not in name} == {"head.weight", "head.bias"}


def test_folding_adds_the_scaled_product_of_both_matrices():
    critic = critic_of("Llama")
    before = {name: tensor.clone() for name, tensor in critic.trunk.state_dict().items()}
    tensors = merged_tensors(moved(critic).trunk)
    assert set(tensors) == set(before)
    parts = dict(critic.trunk.named_parameters())
    for name, tensor in tensors.items():
        place = name.removesuffix(".weight")
        a, b = (parts.get(f"{place}.lora_{letter}.default.weight") for letter in "AB")
        expected = before[name] if a is None or b is None else before[name] + (6.0 / 4) * (b @ a)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
    assert any(not torch.equal(tensors[name], before[name]) for name in tensors)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "GPTNeoX", "Gemma3Text"])
def test_a_checkpoint_holds_the_folded_weights(family, tmp_path):
    critic = moved(critic_of(family))
    save_critic(critic, tmp_path, None)
    expected = values_of(critic)
    np.testing.assert_allclose(
        values_of(load_critic(read_model(tmp_path)).eval()), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()
    )
    if family != "Gemma3Text":
        _, report = AutoModelForTokenClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_adapters_are_put_back_to_the_bit(tmp_path):
    critic = moved(critic_of("Llama"))
    save_critic(critic, tmp_path, None)
    assert (tmp_path / ADAPTER_FILE).is_file()
    again = critic_of("Llama")
    add_adapters(again, rank=4, alpha=6.0, seed=9)
    load_adapters(again, tmp_path)
    assert np.array_equal(values_of(again), values_of(critic))


MIXTURES = ["Qwen3-MoE", "Mixtral", "DeepSeek-V3, Kimi-K2, Moonlight", "GLM-4.5", "GPT-OSS", "Llama 4 (text)"]


@pytest.mark.parametrize("name", MIXTURES)
def test_adapters_of_a_mixture_of_experts_fold_into_what_transformers_loads_alone(name, tmp_path):
    """Experts have none, which is said; routers that give more than one tensor have none either (Llama 4)."""
    critic = build_critic(text_config(name), seed=0).eval()
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    moved(critic)
    trained = {key for key, p in critic.trunk.named_parameters() if p.requires_grad}
    assert trained
    assert not any("experts.lora" in key or "router" in key for key in trained)
    (notice,) = adapter_notice(critic)
    assert "without any, and not trained" in notice.message
    assert "experts" in notice.message
    save_critic(critic, tmp_path, None)
    expected = rows_of(critic)
    largest = np.abs(expected).max()
    assert np.abs(rows_of(load_critic(read_model(tmp_path)).eval()) - expected).max() <= 1e-5 * largest
    if loads_for_token_classification(critic):
        model, report = AutoModelForTokenClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert np.abs(logits_alone(model.eval()) - expected).max() <= 1e-5 * largest


def test_dense_layers_beside_experts_have_adapters_whatever_their_names():
    """peft takes gate_proj for that of fused experts in a Qwen3-MoE, and then adapts those in place of dense layers."""
    critic = build_critic(text_config("Qwen3-MoE", mlp_only_layers=[0]), seed=0)
    add_adapters(critic, rank=4, alpha=6.0, seed=3)
    adapted = {name.partition(".lora_")[0] for name, p in critic.trunk.named_parameters() if p.requires_grad}
    dense = {f"layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    attention = {f"layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkvo"}
    assert adapted == dense | attention


def test_a_projection_that_fused_kernels_read_by_its_weight_has_none():
    critic = build_critic(text_config("Granite 4 hybrid"), seed=0)
    add_adapters(critic, rank=4, alpha=6.0, seed=3)
    adapted = {name.partition(".lora_")[0] for name, p in critic.trunk.named_parameters() if p.requires_grad}
    assert "layers.0.mamba.in_proj" in adapted
    assert "layers.0.mamba.out_proj" not in adapted


def test_adapters_of_other_layers_are_refused_by_name(tmp_path):
    critic = moved(critic_of("Llama"))
    save_critic(critic, tmp_path, None)
    other = critic_of("GPTNeoX")
    add_adapters(other, rank=4, alpha=6.0, seed=3)
    with pytest.raises(ModelError, match=r"other adapters: 28 too many, .* and \d+ missing"):
        load_adapters(other, tmp_path)
