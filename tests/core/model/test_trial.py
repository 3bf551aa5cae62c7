"""What a trial is made of: rollouts cut and filled up so that they stand where a micro-batch has them, cheaply."""

import numpy as np
import pytest
import torch
from support import branching_rollouts, rollouts_of, small_config

from critic_train.errors import ModelError
from critic_train.layers.attention import TREE_ATTENTION
from critic_train.layers.attention_kernel import SHORT_GAP
from critic_train.layers.prefix_tree import build_tree_layout
from critic_train.model import trial
from critic_train.model.trial import Trial, cut, use_stock_attention, with_filler
from critic_train.weights.loading import build_critic


def test_rollouts_stand_behind_as_many_positions_as_asked_for_most_of_them_read():
    rollouts = branching_rollouts()
    members = np.asarray([2, 3, 7])
    filled, order = with_filler(rollouts, members, 500)
    layout = build_tree_layout(filled, order)
    assert 500 <= len(layout) < 500 + int(rollouts.lengths[members].max())
    # The rollouts themselves come last; their depth is still counted from their own start.
    assert set(order.index[-3:].tolist()) == {2, 3, 7}
    assert layout.depth[layout.segment_starts[-4]] == 0
    own = len(rollouts.input_ids)
    unread = len(filled.input_ids) - own - int(filled.response_mask[own:].sum())
    assert SHORT_GAP <= unread < 500 / 2
    assert filled.input_ids.max() < 128


def test_cut_rollouts_are_their_own_beginnings_and_have_a_response():
    rollouts = rollouts_of([np.arange(10, dtype=np.int32), np.arange(20, 24, dtype=np.int32)], [6, 1])
    shorter = cut(rollouts, 5)
    assert shorter.input_ids.tolist() == [0, 1, 2, 3, 4, 20, 21, 22, 23]
    assert shorter.offsets.tolist() == [0, 5, 9]
    # The first one's response is cut away: its second half takes the part.
    assert shorter.response_mask.tolist() == [False, False, False, True, True, False, True, True, True]


def test_where_scores_are_written_out_only_as_much_is_tried_as_memory_holds(monkeypatch):
    critic = build_critic(small_config("GptOss", head_dim=16, num_local_experts=2, num_experts_per_tok=1), seed=0)
    use_stock_attention(critic)
    monkeypatch.setattr(trial, "MOST_SCORE_BYTES", 4 * 4 * 12**2)
    tried = Trial(critic, branching_rollouts(), 300, None)
    assert int(tried.rollouts.lengths.max()) == 12
    critic.trunk.set_attn_implementation(TREE_ATTENTION)
    assert tried.forest().agrees


def test_a_model_that_sees_the_next_token_only_in_long_rollouts_is_refused():
    critic = build_critic(small_config("Llama"), seed=0)
    use_stock_attention(critic)
    layer = critic.trunk.layers[0]
    layer.mlp.register_forward_hook(lambda _, __, output: output + 1e-3 * output.mean(1, keepdim=True))
    with pytest.raises(ModelError, match="llama looks ahead: a state changes when the tokens after it are missing"):
        Trial(critic, branching_rollouts(), 0, None)


def test_the_trunk_has_the_attention_that_it_was_given_after_a_measurement():
    critic = build_critic(small_config("Llama"), seed=0)
    use_stock_attention(critic)
    tried = Trial(critic, branching_rollouts(), 0, None)
    critic.trunk.set_attn_implementation(TREE_ATTENTION)
    assert tried.alone.explains(tried.alone.expected)
    assert critic.trunk.config._attn_implementation == TREE_ATTENTION
    assert tried.alone.expected.shape == torch.Size([len(tried.rollouts.input_ids), 64])


def test_no_more_is_laid_out_together_than_a_micro_batch_has_and_the_branch_always_stands_by_its_rollout(monkeypatch):
    rng = np.random.default_rng(0)
    prompt = rng.integers(1, 100, 60)
    sequences = [np.concatenate([prompt, rng.integers(1, 100, 60)]).astype(np.int32) for _ in range(6)]
    critic = build_critic(small_config("Llama"), seed=0)
    use_stock_attention(critic)
    tried = Trial(critic, rollouts_of(sequences, [60] * 6), 0, None)
    critic.trunk.set_attn_implementation(TREE_ATTENTION)
    laid_out, orders = [], []
    plain, filler = type(critic).hidden, trial.with_filler
    monkeypatch.setattr(
        type(critic), "hidden", lambda self, batch: laid_out.append(batch.computed_tokens) or plain(self, batch)
    )
    monkeypatch.setattr(trial, "with_filler", lambda *given: orders.append(given[1].tolist()) or filler(*given))
    assert tried.forest(few=True).agrees
    longest = 120
    assert len(laid_out) > 1
    assert max(laid_out) <= 2 * longest + longest  # beside what is not read
    assert sorted({number for order in orders for number in order}) == list(range(7))
    assert any({0, 6} <= set(order) for order in orders)


def test_every_head_has_keys_of_its_own_in_float32_on_a_gpu():
    """Torch's operators for shared heads write the scores out there; what is computed is the same."""
    query, key, value = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    asked = []

    class OnGpu(torch.Tensor):
        is_cuda = True

    with _Asked(asked), trial.HeadsOfTheirOwn():
        found = torch.nn.functional.scaled_dot_product_attention(
            query.as_subclass(OnGpu), key, value, is_causal=True, enable_gqa=True
        )
    assert asked == [((1, 4, 6, 8), False)]
    assert torch.allclose(found.as_subclass(torch.Tensor), expected, atol=1e-6)


class _Asked(torch.overrides.TorchFunctionMode):
    """Notes the keys' shape and whether heads are shared."""

    def __init__(self, asked):
        super().__init__()
        self.asked = asked

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.asked.append((tuple(args[1].shape), kwargs["enable_gqa"]))
        return function(*args, **(kwargs or {}))
