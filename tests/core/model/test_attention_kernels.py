"""Every way to compute attention on a prefix tree, held against plain attention under the mask written out."""

from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import branching_rollouts, rollouts_of

from critic_train.errors import ConfigError, MachineError
from critic_train.model.attention import KERNELS, TreeAttentionPlan, choose_attention, kernel_error, kernels_to_try
from critic_train.model.attention_kernel import Queries, all_queries, fill_short_gaps, queries_at
from critic_train.model.cuda_kernels import BLOCK, FlexKernel, VarlenKernel
from critic_train.model.prefix_tree import TreeLayout, attention_mask, build_tree_layout, prefix_order
from critic_train.model.sdpa_kernels import CpuFlashKernel, SdpaKernel
from critic_train.settings import Attention

CPU = torch.device("cpu")
HEADS, KV_HEADS, WIDTH = 4, 2, 16


def layout_of(seed: int) -> TreeLayout:
    """Branching rollouts with prompts and responses; rollouts one token long; every form a tree can have."""
    rollouts = branching_rollouts(seed)
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
    layout: TreeLayout, positions: np.ndarray, window: int | None, tensors: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Attention over all pairs under the mask: [1, Q, heads, head_dim]."""
    seen = attention_mask(layout)
    if window is not None:
        seen &= layout.depth[:, None] - layout.depth[None, :] < window
    query, key, value = tensors
    key, value = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) / WIDTH**0.5
    scores = scores.masked_fill(~torch.from_numpy(seen[positions]), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def queries_of(layout: TreeLayout, seed: int, asking: str) -> tuple[Queries, np.ndarray]:
    if asking == "all":
        return all_queries(layout), np.arange(len(layout))
    positions = some_positions(layout, seed)
    return queries_at(layout, positions), positions


def check(kernel, layout, positions, window):
    tensors = drawn(layout, len(positions))
    expected = plain(layout, positions, window, tensors)
    slope = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, tensors, slope)
    actual = kernel(*tensors, window, None)
    assert actual.shape == expected.shape
    assert float((actual - expected).detach().abs().max()) <= 2e-6
    for one, other in zip(torch.autograd.grad(actual, tensors, slope), wanted, strict=True):
        assert float((one - other).abs().max()) <= 1e-5


@pytest.mark.parametrize("asking", ["all", "some"])
@pytest.mark.parametrize("seed", range(4))
def test_tiles_are_plain_attention(seed, asking):
    layout = layout_of(seed)
    queries, positions = queries_of(layout, seed, asking)
    check(CpuFlashKernel(queries), layout, positions, None)


@pytest.mark.parametrize("asking", ["all", "some"])
def test_tiles_hold_every_pair_that_attends_once_and_no_other(asking):
    layout = layout_of(1)
    queries, positions = queries_of(layout, 1, asking)
    pairs = np.zeros((len(positions), len(layout)), dtype=int)
    for tile in CpuFlashKernel(queries).tiles:
        block = pairs[slice(*tile.queries), slice(*tile.keys)]
        block += np.tri(*block.shape, dtype=int) if tile.causal else 1
    np.testing.assert_array_equal(pairs, attention_mask(layout)[positions])


def test_tiles_in_bf16_lose_no_more_than_plain_attention_in_bf16():
    layout = layout_of(0)
    tensors = drawn(layout, len(layout))
    exact = plain(layout, np.arange(len(layout)), None, tensors)
    rounded = tuple(tensor.detach().bfloat16() for tensor in tensors)
    actual = CpuFlashKernel(all_queries(layout))(*rounded, None, None)
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
        expected = plain(layout, np.arange(len(layout)), window, tensors)
        assert float((plan.attend(*tensors, window, None) - expected).detach().abs().max()) <= 2e-6


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


KERNELS_WITH_WINDOWS = {
    "sdpa": lambda queries: SdpaKernel(queries, CPU),
    "varlen": lambda queries: VarlenKernel(queries, CPU, attend=varlen_by_hand),
}


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("asking", ["all", "some"])
@pytest.mark.parametrize("seed", [0, 2])
@pytest.mark.parametrize("name", KERNELS_WITH_WINDOWS)
def test_kernels_are_plain_attention_windows_in_the_rollout_included(name, seed, asking, window):
    layout = layout_of(seed)
    queries, positions = queries_of(layout, seed, asking)
    check(KERNELS_WITH_WINDOWS[name](queries), layout, positions, window)


def test_varlen_of_torch_2_11_is_asked_without_a_word_about_shared_heads(monkeypatch):
    """There varlen_attn has no `enable_gqa`; its kernel shares heads without it."""

    def of_2_11(query, key, value, q, k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        shared = query.shape[1] != key.shape[1]
        more = {"scale": scale, "window_size": window_size, "enable_gqa": shared}
        return varlen_by_hand(query, key, value, q, k, max_q, max_k, **more)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", of_2_11)
    layout = layout_of(0)
    check(VarlenKernel(all_queries(layout), CPU), layout, np.arange(len(layout)), None)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("asking", ["all", "some"])
def test_flex_attention_is_plain_attention(asking, window):
    """Forward only: FlexAttention has no backward pass on a CPU."""
    layout = layout_of(0)
    queries, positions = queries_of(layout, 0, asking)
    tensors = [tensor.detach() for tensor in drawn(layout, len(positions))]
    expected = plain(layout, positions, window, tensors)
    assert float((FlexKernel(queries, CPU)(*tensors, window, None) - expected).abs().max()) <= 2e-6


def large_forest() -> TreeLayout:
    """Three prompts with eight responses each, long enough for whole blocks, and a branch in mid-response."""
    draw = np.random.default_rng(0)
    sequences = []
    for length in (300, 40, 700):
        prompt = draw.integers(1, 128, length)
        family = [np.concatenate([prompt, draw.integers(1, 128, int(draw.integers(20, 400)))]) for _ in range(8)]
        sequences += [*family, np.concatenate([family[0][: length + 15], draw.integers(1, 128, 200)])]
    rollouts = rollouts_of([s.astype(np.int32) for s in sequences], [1] * len(sequences))
    return build_tree_layout(rollouts, prefix_order(rollouts))


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("asking", ["all", "some"])
def test_the_block_mask_is_the_one_that_trying_every_pair_gives(asking, window):
    from torch.nn.attention.flex_attention import create_block_mask

    layout = large_forest()
    queries, positions = queries_of(layout, 0, asking)
    ours = FlexKernel(queries, CPU).block_mask(window)
    theirs = create_block_mask(ours.mask_mod, 1, 1, len(positions), len(layout), device="cpu", BLOCK_SIZE=BLOCK)
    seen = attention_mask(layout)[positions]
    if window is not None:
        seen &= (layout.depth[positions][:, None] - layout.depth[None, :]) < window
    assert bool((dense(ours, whole=True) <= dense(theirs, whole=True)).all())
    visited, needed = dense(ours, whole=False), dense(theirs, whole=False)
    assert bool((visited >= needed).all())
    if asking == "all" and window is None:
        assert torch.equal(visited, needed)
        assert torch.equal(dense(ours, whole=True), dense(theirs, whole=True))
        assert 0 < int(dense(ours, whole=True).sum()) < int(visited.sum()) < visited.numel() / 2
    # No pair is lost, and none is added: a block seen whole holds nothing that is hidden.
    blocks = np.zeros((visited.shape[0] * BLOCK, visited.shape[1] * BLOCK), dtype=bool)
    blocks[: seen.shape[0], : seen.shape[1]] = seen
    blocks = blocks.reshape(visited.shape[0], BLOCK, visited.shape[1], BLOCK)
    assert not (blocks.any((1, 3)) & ~visited.numpy()).any()
    assert blocks.all((1, 3))[dense(ours, whole=True).numpy()].all()


def dense(mask, *, whole: bool) -> torch.Tensor:
    """bool [blocks of queries, blocks of keys]: the blocks seen whole, or all that are visited."""
    shape = mask.kv_indices.shape[2:]
    actual = torch.zeros(shape, dtype=torch.bool)
    lists = [(mask.full_kv_num_blocks, mask.full_kv_indices)]
    if not whole:
        lists.append((mask.kv_num_blocks, mask.kv_indices))
    for counts, indices in lists:
        for row, count in enumerate(counts[0, 0].tolist()):
            actual[row, indices[0, 0, row, :count].long()] = True
    return actual


def test_every_value_of_the_flag_but_auto_names_a_kernel():
    assert set(get_args(Attention)) == {"auto", *KERNELS}


def test_a_cpu_takes_scaled_dot_product_attention_and_refuses_the_others():
    assert choose_attention("auto", layout_of(0), CPU, "fp32") == ("sdpa", [])
    assert choose_attention("auto", layout_of(0), CPU, "bf16") == ("sdpa", [])
    with pytest.raises(ConfigError, match="flex needs a CUDA device"):
        kernels_to_try("flex", CPU, "fp32")
    with pytest.raises(ConfigError, match="varlen needs --precision bf16 and a CUDA device"):
        kernels_to_try("varlen", CPU, "bf16")


def test_cuda_takes_variable_length_attention_in_bf16_and_flex_in_float32(monkeypatch):
    from critic_train.model import cuda_kernels

    cuda = torch.device("cuda")
    monkeypatch.setattr(cuda_kernels, "varlen_available", lambda device: True)
    assert kernels_to_try("auto", cuda, "bf16") == ["varlen", "flex", "sdpa"]
    assert kernels_to_try("auto", cuda, "fp32") == ["flex", "sdpa"]
    with pytest.raises(ConfigError, match="not fp32"):
        kernels_to_try("varlen", cuda, "fp32")
    monkeypatch.setattr(cuda_kernels, "varlen_available", lambda device: False)
    assert kernels_to_try("auto", cuda, "bf16") == ["flex", "sdpa"]


def test_a_kernel_that_is_wrong_or_fails_is_passed_over(monkeypatch):
    from critic_train.model import attention

    layout = layout_of(0)
    right = lambda queries: VarlenKernel(queries, CPU, attend=varlen_by_hand)  # noqa: E731
    assert kernel_error(right, layout, CPU, torch.float32) == ""

    def without_mask(*arguments, window_size, **more):
        return varlen_by_hand(*arguments, window_size=(-1, 10**6), **more)

    wrong = lambda queries: VarlenKernel(queries, CPU, attend=without_mask)  # noqa: E731
    assert "differs from scaled-dot-product attention" in kernel_error(wrong, layout, CPU, torch.float32)
    monkeypatch.setattr(attention, "kernels_to_try", lambda *_: ["flex", "sdpa"])
    chosen, passed = choose_attention("auto", layout, CPU, "fp32")
    assert chosen == "sdpa"
    assert "--attention flex is not used: it fails on cpu" in passed[0]
    monkeypatch.setattr(attention, "kernels_to_try", lambda *_: ["flex"])
    with pytest.raises(MachineError, match="flex is not used"):
        choose_attention("flex", layout, CPU, "fp32")
