"""Every way to compute attention on a forest, held against plain attention under the mask written out."""

import numpy as np
import pytest
import torch
from support import branching_rollouts, rollouts_of

from critic_train.model.attention import ForestPlan
from critic_train.model.forest import Forest, attention_mask, lay_out, prefix_order
from critic_train.model.kernels.pieces import Pieces
from critic_train.model.kernels.queries import Queries, all_queries, queries_at, without_short_gaps
from critic_train.model.kernels.segments import Segments

CPU = torch.device("cpu")
HEADS, KV_HEADS, WIDTH = 4, 2, 16


def forest_of(seed: int) -> Forest:
    """Branching rollouts with prompts and responses; rollouts one token long; every form a tree can have."""
    rollouts = branching_rollouts(seed)
    if seed == 2:
        lists = [[1], [1, 2], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 9], [1, 7, 8], [5], [6, 6, 6, 6], [6, 6, 6, 7]]
        rollouts = rollouts_of([np.asarray(ids, dtype=np.int32) for ids in lists], [1] * len(lists))
    return lay_out(rollouts, prefix_order(rollouts))


def some_positions(forest: Forest, seed: int) -> np.ndarray:
    """Runs of positions with gaps between them, some of which cross from one rollout to the next."""
    draw = np.random.default_rng(seed)
    asked = np.repeat(draw.random(len(forest) // 3 + 1) < 0.6, 3)[: len(forest)]
    asked[-1] = True
    return np.flatnonzero(asked)


def drawn(forest: Forest, queries: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((1, HEADS, queries, WIDTH), (1, KV_HEADS, len(forest), WIDTH), (1, KV_HEADS, len(forest), WIDTH))
    return tuple(torch.randn(shape, requires_grad=True) for shape in shapes)


def plain(forest: Forest, positions: np.ndarray, window: int | None, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Attention over all pairs under the mask: [1, Q, heads, head_dim]."""
    seen = attention_mask(forest)
    if window is not None:
        seen &= forest.depth[:, None] - forest.depth[None, :] < window
    query, key, value = tensors
    key, value = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) / WIDTH**0.5
    scores = scores.masked_fill(~torch.from_numpy(seen[positions]), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def queries_of(forest: Forest, seed: int, asking: str) -> tuple[Queries, np.ndarray]:
    if asking == "all":
        return all_queries(forest), np.arange(len(forest))
    positions = some_positions(forest, seed)
    return queries_at(forest, positions), positions


def check(kernel, forest, positions, window):
    tensors = drawn(forest, len(positions))
    expected = plain(forest, positions, window, tensors)
    slope = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, tensors, slope)
    found = kernel(*tensors, window, None)
    assert found.shape == expected.shape
    assert float((found - expected).detach().abs().max()) <= 2e-6
    for one, other in zip(torch.autograd.grad(found, tensors, slope), wanted, strict=True):
        assert float((one - other).abs().max()) <= 1e-5


@pytest.mark.parametrize("asking", ["all", "some"])
@pytest.mark.parametrize("seed", range(4))
def test_pieces_are_plain_attention(seed, asking):
    forest = forest_of(seed)
    queries, positions = queries_of(forest, seed, asking)
    check(Pieces(queries), forest, positions, None)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("asking", ["all", "some"])
@pytest.mark.parametrize("seed", [0, 2])
def test_segments_are_plain_attention_windows_in_the_rollout_included(seed, asking, window):
    forest = forest_of(seed)
    queries, positions = queries_of(forest, seed, asking)
    check(Segments(queries, CPU), forest, positions, window)


@pytest.mark.parametrize("asking", ["all", "some"])
def test_pieces_hold_every_pair_that_is_seen_once_and_no_other(asking):
    forest = forest_of(1)
    queries, positions = queries_of(forest, 1, asking)
    pairs = np.zeros((len(positions), len(forest)), dtype=int)
    for piece in Pieces(queries).pieces:
        block = pairs[slice(*piece.queries), slice(*piece.keys)]
        block += np.tri(*block.shape, dtype=int) if piece.causal else 1
    np.testing.assert_array_equal(pairs, attention_mask(forest)[positions])


def test_pieces_in_bf16_lose_no_more_than_plain_attention_in_bf16():
    forest = forest_of(0)
    tensors = drawn(forest, len(forest))
    exact = plain(forest, np.arange(len(forest)), None, tensors)
    rounded = tuple(tensor.detach().bfloat16() for tensor in tensors)
    found = Pieces(all_queries(forest))(*rounded, None, None)
    assert found.dtype == torch.bfloat16
    assert float((found - exact).abs().max()) <= 0.03


def test_only_long_stretches_that_nobody_reads_are_left_out():
    forest = lay_out(*one_long_rollout(400))
    read = np.asarray([100, 101, 130, 399])
    kept = without_short_gaps(forest, read)
    assert kept.tolist() == [*range(100, 131), 399]
    assert without_short_gaps(forest, np.asarray([63])).tolist() == list(range(64))
    assert without_short_gaps(forest, np.asarray([64])).tolist() == [64]


def one_long_rollout(length):
    rollouts = rollouts_of([np.arange(length, dtype=np.int32) % 100], [1])
    return rollouts, prefix_order(rollouts)


def test_a_plan_takes_pieces_where_no_window_cuts_and_segments_where_one_does():
    forest = forest_of(0)
    plan = ForestPlan(forest, np.arange(len(forest)), CPU)
    assert plan.kept is None
    tensors = drawn(forest, len(forest))
    for window in (None, 10_000, 5):
        expected = plain(forest, np.arange(len(forest)), window, tensors)
        assert float((plan.attend(*tensors, window, None) - expected).detach().abs().max()) <= 2e-6
