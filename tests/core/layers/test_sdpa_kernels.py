"""Attention by tiles: plain attention, with every pair that attends once and no other."""

import numpy as np
import pytest
import torch
from attention_cases import (
    CPU,
    check,
    drawn,
    layout_of,
    plain,
    queries_of,
)
from support import rollouts_of

from critic_train.layers.attention import TreeAttentionPlan
from critic_train.layers.attention_kernel import Scoring, all_queries, fill_short_gaps
from critic_train.layers.prefix_tree import attention_mask, build_tree_layout, prefix_order
from critic_train.layers.sdpa_kernels import CpuFlashKernel, tiles_of


@pytest.mark.parametrize("asking", ["all", "some"])
@pytest.mark.parametrize("seed", range(5))
def test_tiles_are_plain_attention(seed, asking):
    layout = layout_of(seed)
    queries, positions = queries_of(layout, seed, asking)
    check(CpuFlashKernel(queries), layout, positions)


@pytest.mark.parametrize("asking", ["all", "some"])
@pytest.mark.parametrize("seed", [1, 4])
def test_tiles_hold_every_pair_that_attends_once_and_no_other(seed, asking):
    layout = layout_of(seed)
    queries, positions = queries_of(layout, seed, asking)
    pairs = np.zeros((len(positions), len(layout)), dtype=int)
    for tile in tiles_of(queries):
        block = pairs[slice(*tile.queries), slice(*tile.keys[0])]
        rows, keys = block.shape
        block += np.tri(rows, keys, keys - rows, dtype=int) if tile.first else 1
    np.testing.assert_array_equal(pairs, attention_mask(layout)[positions])


def test_tiles_in_bf16_lose_no_more_than_plain_attention_in_bf16():
    layout = layout_of(0)
    tensors = drawn(layout, len(layout))
    exact = plain(layout, np.arange(len(layout)), Scoring(), tensors)
    rounded = tuple(tensor.detach().bfloat16() for tensor in tensors)
    actual = CpuFlashKernel(all_queries(layout))(*rounded, Scoring())
    assert actual.dtype == torch.bfloat16
    assert float((actual - exact).abs().max()) <= 0.03


def test_only_long_stretches_that_nobody_reads_are_left_out():
    layout = build_tree_layout(*one_long_rollout(400))
    read = np.asarray([100, 101, 130, 399])
    kept = fill_short_gaps(layout, read)
    assert kept.tolist() == [*range(100, 131), 399]
    assert fill_short_gaps(layout, np.asarray([63])).tolist() == list(range(64))
    assert fill_short_gaps(layout, np.asarray([64])).tolist() == [64]


def one_long_rollout(length):
    rollouts = rollouts_of([np.arange(length, dtype=np.int32) % 100], [1])
    return rollouts, prefix_order(rollouts)


def test_a_plan_takes_tiles_where_no_window_cuts_and_masks_where_one_does():
    layout = layout_of(0)
    plan = TreeAttentionPlan(layout, np.arange(len(layout)), CPU)
    assert plan.needed is None
    assert TreeAttentionPlan(layout, np.zeros(0, dtype=np.int64), CPU).needed is None
    tensors = drawn(layout, len(layout))
    for window in (None, 10_000, 5):
        expected = plain(layout, np.arange(len(layout)), Scoring(window=window), tensors)
        assert float((plan.attend(*tensors, Scoring(window=window)) - expected).detach().abs().max()) <= 2e-6
