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
