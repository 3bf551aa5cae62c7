"""A rollout in a forest gives the values and gradients of the rollout alone.

The yardstick is transformers' own token classifier on one rollout at a time, with its own attention.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support import branching_rollouts, small_config
from transformers import AutoModelForTokenClassification

from critic_train.layers.prefix_tree import prefix_order
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.last_layer import skip_unread_positions
from critic_train.model.microbatches import micro_batches, predict_values
from critic_train.model.model_input import tree_input
from critic_train.model.selfcheck import use_stock_attention
from critic_train.rollouts import Rollouts
from critic_train.stopping import StopRequest
from critic_train.training.train_step import LossRecipe, accumulate_gradient, mini_batch_weights
from critic_train.weights.loading import build_critic
from critic_train.weights.saving import save_critic

CPU = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=10_000)
RECIPE = LossRecipe(cliprange_value=0.5, mode="token-mean", scale_factor=None)
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": None},
    "Mistral, window of 8": {"sliding_window": 8},
    "GPTNeoX": {},
    "GptOss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "Gemma2": {"head_dim": 16, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 1, "sliding_window": 8},
    "DeepseekV3": {
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}


def critic_of(name: str) -> Critic:
    config = small_config(name.split(",")[0], **FAMILIES[name])
    critic = build_critic(config, seed=3)
    assert skip_unread_positions(critic.trunk)
    with torch.no_grad():  # a head at 0 would make every value equal
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    return critic


def values_alone(model: torch.nn.Module, rollouts: Rollouts) -> torch.Tensor:
    """float32 [T]: logits of one rollout at a time, shifted by one; the first token of each has none."""
    found = []
    for start, stop in zip(rollouts.offsets[:-1].tolist(), rollouts.offsets[1:].tolist(), strict=True):
        ids = torch.from_numpy(rollouts.input_ids[start:stop].astype(np.int64))
        logits = model(input_ids=ids[None]).logits[0, :, 0]
        found.append(torch.cat([torch.zeros(1), logits[:-1]]))
    return torch.cat(found)


def loss_alone(model: torch.nn.Module, rollouts: Rollouts) -> torch.Tensor:
    """The clipped value loss, token mean, written out once more."""
    mask = torch.from_numpy(rollouts.response_mask)
    value = values_alone(model, rollouts)[mask]
    target = torch.from_numpy(rollouts.returns)[mask]
    old = torch.from_numpy(rollouts.values)[mask]
    clipped = old + (value - old).clamp(-0.5, 0.5)
    return 0.5 * torch.maximum((value - target) ** 2, (clipped - target) ** 2).mean()


@pytest.fixture(params=list(FAMILIES))
def critic_and_reference(request, tmp_path):
    critic = critic_of(request.param)
    save_critic(critic, tmp_path, None)
    attention = "eager" if request.param in ("GptOss", "Gemma2") else "sdpa"
    reference = AutoModelForTokenClassification.from_pretrained(tmp_path, attn_implementation=attention)
    return critic, reference.eval()


def test_values_in_a_forest_are_those_of_the_rollout_alone(critic_and_reference):
    critic, reference = critic_and_reference
    rollouts = branching_rollouts()
    forest = predict_values(critic, rollouts, CPU, forest=True)
    with torch.no_grad():
        alone = values_alone(reference, rollouts).numpy()
    mask = rollouts.response_mask
    assert np.ptp(alone[mask]) > 1.0
    assert np.abs(forest[mask] - alone[mask]).max() <= 1e-5
    batch = tree_input(rollouts, prefix_order(rollouts), torch.device("cpu"))
    assert batch.computed_tokens < 0.7 * len(rollouts.input_ids)


def test_gradients_in_a_forest_are_those_of_the_rollouts_alone(critic_and_reference):
    critic, reference = critic_and_reference
    rollouts = branching_rollouts()
    result = accumulate_gradient(critic, rollouts, RECIPE, CPU, forest=True, stop=StopRequest())
    loss = loss_alone(reference, rollouts)
    loss.backward()
    assert result.value_loss == pytest.approx(loss.item(), rel=1e-6)
    prefix = type(reference).base_model_prefix
    theirs = {
        name.replace(f"{prefix}.", "trunk.", 1).replace("score.", "head.").replace("classifier.", "head."): p.grad
        for name, p in reference.named_parameters()
    }
    ours = {name: p.grad for name, p in critic.named_parameters()}
    assert set(ours) == set(theirs)
    for name, gradient in ours.items():
        difference = (gradient - theirs[name]).norm() / theirs[name].norm()
        assert difference <= 1e-5, name


def test_rollouts_that_share_part_of_their_response_keep_their_own_returns():
    """Two rollouts agree for three response tokens and have different returns there: both gradients arrive."""
    critic = critic_of("Llama")
    rollouts = branching_rollouts()
    order = prefix_order(rollouts)
    prompt = [rollouts.response_mask[start:].argmax() for start in rollouts.offsets[:-1]]
    shares_response = order.shared > np.asarray(prompt)[order.index] + 2
    assert shares_response.any()
    together = gradient_of(critic, rollouts, forest=True)
    alone = [rollouts.take(np.asarray([i])) for i in range(len(rollouts))]
    apart = sum(gradient_of(critic, one, forest=True) * int(one.response_mask.sum()) for one in alone)
    apart /= int(rollouts.response_mask.sum())
    assert float((together - apart).norm() / apart.norm()) <= 1e-5


def gradient_of(critic: Critic, rollouts: Rollouts, *, forest: bool, **changes: object) -> torch.Tensor:
    """All gradients of a mini-batch's loss in one vector."""
    critic.zero_grad(set_to_none=True)
    compute = replace(CPU, **changes)
    accumulate_gradient(critic, rollouts, RECIPE, compute, forest=forest, stop=StopRequest())
    return torch.cat([p.grad.flatten() for p in critic.parameters()]).double()


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_the_gradient_does_not_depend_on_micro_batches_packing_or_order(mode):
    critic = critic_of("Llama")
    rollouts = branching_rollouts()
    recipe = LossRecipe(cliprange_value=0.5, mode=mode, scale_factor=9.0)

    def gradient(batch: Rollouts, *, forest: bool, max_tokens: int) -> torch.Tensor:
        critic.zero_grad(set_to_none=True)
        compute = replace(CPU, max_tokens=max_tokens)
        accumulate_gradient(critic, batch, recipe, compute, forest=forest, stop=StopRequest())
        return torch.cat([p.grad.flatten() for p in critic.parameters()]).double()

    whole = gradient(rollouts, forest=True, max_tokens=10_000)
    shuffled = rollouts.take(np.random.default_rng(5).permutation(len(rollouts)))
    for max_tokens in (1, 30, 70, 200):
        part = gradient(shuffled, forest=True, max_tokens=max_tokens)
        assert float((part - whole).norm() / whole.norm()) <= 1e-5
    use_stock_attention(critic)
    for max_tokens in (1, 120, 10_000):
        rows = gradient(shuffled, forest=False, max_tokens=max_tokens)
        assert float((rows - whole).norm() / whole.norm()) <= 1e-5


def test_micro_batches_hold_to_the_budget_and_every_response_token_once():
    rollouts = branching_rollouts()
    for max_tokens in (60, 100, 300):
        for forest in (True, False):
            batches = list(micro_batches(rollouts, replace(CPU, max_tokens=max_tokens), forest=forest))
            assert all(batch.computed_tokens <= max_tokens for batch in batches)
            tokens = np.sort(np.concatenate([batch.response_tokens for batch in batches]))
            np.testing.assert_array_equal(tokens, np.flatnonzero(rollouts.response_mask))


def test_bf16_keeps_weights_head_and_loss_in_float32():
    critic = critic_of("Llama")
    rollouts = branching_rollouts()
    compute = replace(CPU, precision="bf16")
    values = predict_values(critic, rollouts, compute, forest=True)
    exact = predict_values(critic, rollouts, CPU, forest=True)
    difference = np.abs(values - exact)[rollouts.response_mask].max()
    assert 0 < difference < 0.2
    gradient_of(critic, rollouts, forest=True, precision="bf16")
    assert {p.dtype for p in critic.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in critic.parameters()} == {torch.float32}


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_a_shared_prefix_learns_the_mean_of_its_continuations(mode):
    """A state that several rollouts pass through has the mean of their returns as its target, each weighed as it is."""
    rollouts = branching_rollouts()
    recipe = LossRecipe(cliprange_value=None, mode=mode, scale_factor=None)
    weights, returns = mini_batch_weights(rollouts, recipe), rollouts.returns.astype(np.float64)
    through: dict[tuple[int, ...], list[int]] = {}
    for start, stop in zip(rollouts.offsets[:-1].tolist(), rollouts.offsets[1:].tolist(), strict=True):
        for token in range(start, stop):
            if rollouts.response_mask[token]:
                through.setdefault(tuple(rollouts.input_ids[start:token].tolist()), []).append(token)
    assert max(map(len, through.values())) > 2, "the case is no test otherwise"
    averaged = returns.copy()
    for tokens in through.values():
        averaged[tokens] = np.average(returns[tokens], weights=weights[tokens])
    assert np.abs(averaged - returns).max() > 0.5
    gradients = []
    for targets in (returns, averaged):
        critic = critic_of("Llama")
        given = replace(rollouts, returns=targets.astype(np.float32))
        accumulate_gradient(critic, given, recipe, CPU, forest=True, stop=StopRequest())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in critic.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
