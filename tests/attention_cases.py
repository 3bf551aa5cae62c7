"""Random queries, keys and values over small tree layouts, and plain attention to compare with."""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from support import branching_rollouts, rollouts_of

from critic_train.layers.attention_kernel import PLAIN, Queries, Scoring, all_queries, queries_at
from critic_train.layers.cuda_kernels import VarlenOperators
from critic_train.layers.prefix_tree import TreeLayout, attention_mask, build_tree_layout, prefix_order

CPU = torch.device("cpu")


HEADS, KV_HEADS, WIDTH = 4, 2, 16


def layout_of(seed: int) -> TreeLayout:
    """Branching rollouts with prompts and responses; rollouts one token long; every form a tree can have; long ones."""
    rollouts = branching_rollouts(seed)
    if seed == 4:
        draw = np.random.default_rng(4)
        first = draw.integers(0, 100, 260)
        tails = [draw.integers(0, 100, length) for length in (640, 130, 64, 1)]
        rollouts = rollouts_of([np.concatenate([first, tail]).astype(np.int32) for tail in tails], [260] * len(tails))
    if seed == 2:
        lists = [[1], [1, 2], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 9], [1, 7, 8], [5], [6, 6, 6, 6], [6, 6, 6, 7]]
        rollouts = rollouts_of([np.asarray(ids, dtype=np.int32) for ids in lists], [1] * len(lists))
    return build_tree_layout(rollouts, prefix_order(rollouts))


def some_positions(layout: TreeLayout, seed: int) -> np.ndarray:
    """Runs of positions with gaps between them, some of which cross from one rollout to the next."""
    draw = np.random.default_rng(seed)
    chosen = np.repeat(draw.random(len(layout) // 3 + 1) < 0.6, 3)[: len(layout)]
    chosen[-1] = True
    return np.flatnonzero(chosen)


def drawn(layout: TreeLayout, queries: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((1, HEADS, queries, WIDTH), (1, KV_HEADS, len(layout), WIDTH), (1, KV_HEADS, len(layout), WIDTH))
    return tuple(torch.randn(shape, requires_grad=True) for shape in shapes)


def plain(
    layout: TreeLayout, positions: np.ndarray, scoring: Scoring, tensors: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Attention over all pairs under the mask: [1, Q, heads, value_dim]."""
    seen = attention_mask(layout)
    depth = layout.depth[:, None], layout.depth[None, :]
    if scoring.window is not None:
        seen &= depth[0] - depth[1] < scoring.window
    if scoring.chunk is not None:
        seen &= depth[0] // scoring.chunk == depth[1] // scoring.chunk
    query, key, value = tensors
    key, value = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    shares = scores.masked_fill(~torch.from_numpy(seen[positions]), -torch.inf).exp()
    total = shares.sum(-1, keepdim=True)
    if scoring.sinks is not None:
        total = total + scoring.sinks.exp()[None, :, None, None]
    return (shares / total @ value).transpose(1, 2)


def queries_of(layout: TreeLayout, seed: int, asking: str) -> tuple[Queries, np.ndarray]:
    if asking == "all":
        return all_queries(layout), np.arange(len(layout))
    positions = some_positions(layout, seed)
    return queries_at(layout, positions), positions


def with_sinks(scoring: Scoring) -> Scoring:
    return replace(scoring, sinks=torch.tensor([-1.0, 0.0, 1.0, 3.0], requires_grad=True))


def check(kernel, layout, positions, scoring=PLAIN, value_width=WIDTH):
    query, key, value = drawn(layout, len(positions))
    value = torch.randn(*value.shape[:-1], value_width, requires_grad=True)
    tensors = (query, key, value)
    expected = plain(layout, positions, scoring, tensors)
    slope = torch.randn_like(expected)
    learnt = tensors if scoring.sinks is None else (*tensors, scoring.sinks)
    wanted = torch.autograd.grad(expected, learnt, slope)
    actual = kernel(*tensors, scoring)
    assert actual.shape == expected.shape
    assert float((actual - expected).detach().abs().max()) <= 2e-6
    for one, other in zip(torch.autograd.grad(actual, learnt, slope), wanted, strict=True):
        assert float((one - other).abs().max()) <= 1e-5


def operators_by_hand(attend=None) -> VarlenOperators:
    """The operators of variable-length attention, by default as torch documents them; the backward pass by autograd."""
    attend = attend or varlen_by_hand

    def options(arguments):
        *lengths, causal, scale, window = arguments
        assert causal == (window == [-1, 0])
        return lengths, {"scale": scale, "window_size": tuple(window), "enable_gqa": True}

    def forward(query, key, value, *arguments):
        lengths, named = options(arguments)
        output = attend(query, key, value, *lengths, **named)
        return output, query.new_empty(0), query.new_empty(0)

    def backward(slope, query, key, value, output, lse, *arguments):
        *lengths, causal, _, scale, window = arguments
        lengths, named = options([*lengths, causal, scale, window])
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
            return torch.autograd.grad(attend(*inputs, *lengths, **named), inputs, slope)

    return VarlenOperators(forward=forward, backward=backward)


def varlen_by_hand(query, key, value, query_offsets, key_offsets, max_q, max_k, *, scale, window_size, enable_gqa):
    """What torch documents of varlen_attn: [Q, heads, head_dim] sequences, causal aligned at the lower right."""
    outputs = []
    bounds = zip(query_offsets[:-1], query_offsets[1:], key_offsets[:-1], key_offsets[1:], strict=True)
    for q0, q1, k0, k1 in bounds:
        assert q1 - q0 <= max_q
        assert k1 - k0 <= max_k
        back = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)[None, :]
        left, right = window_size
        seen = (back >= -right) & ((back <= left) | (left < 0))
        q, k, v = (part.transpose(0, 1)[None] for part in (query[q0:q1], key[k0:k1], value[k0:k1]))
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)
