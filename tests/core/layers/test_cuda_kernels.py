"""The kernels for CUDA, on a CPU: flex attention and its block mask, and how variable-length attention is called."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from attention_cases import (
    CPU,
    drawn,
    layout_of,
    operators_by_hand,
    plain,
    queries_of,
    with_sinks,
)
from support import rollouts_of

from critic_train.layers import cuda_kernels
from critic_train.layers.attention_kernel import KernelLacksError, Scoring, all_queries
from critic_train.layers.cuda_kernels import BLOCK, FlexKernel, VarlenKernel
from critic_train.layers.prefix_tree import TreeLayout, attention_mask, build_tree_layout, prefix_order


def test_varlen_keeps_no_keys_of_paths_for_the_backward_pass():
    """Sixty-four rollouts of one prompt have its keys sixty-four times in what the operator is given."""
    layout = layout_of(0)
    kernel = VarlenKernel(all_queries(layout), CPU, operators=operators_by_hand())
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape[0])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kernel(*drawn(layout, len(layout)), Scoring(scale=0.25))
    assert kept
    assert max(kept) == len(layout)


@pytest.mark.parametrize(
    "scoring",
    [
        Scoring(),
        Scoring(window=5),
        Scoring(chunk=6),
        Scoring(softcap=2.0),
        with_sinks(Scoring()),
        with_sinks(Scoring(window=7, softcap=3.0)),
    ],
    ids=["plain", "window", "chunk", "softcap", "sinks", "all"],
)
@pytest.mark.parametrize("asking", ["all", "some"])
def test_flex_attention_is_plain_attention(asking, scoring):
    """Forward only: FlexAttention has no backward pass on a CPU."""
    layout = layout_of(0)
    queries, positions = queries_of(layout, 0, asking)
    scoring = replace(scoring, sinks=None if scoring.sinks is None else scoring.sinks.detach())
    tensors = [tensor.detach() for tensor in drawn(layout, len(positions))]
    expected = plain(layout, positions, scoring, tensors)
    assert float((FlexKernel(queries, CPU)(*tensors, scoring) - expected).abs().max()) <= 2e-6


@pytest.mark.parametrize("scoring", [Scoring(softcap=2.0), with_sinks(Scoring())])
def test_varlen_says_what_it_does_not_compute(scoring):
    layout = layout_of(0)
    kernel = VarlenKernel(all_queries(layout), CPU, operators=operators_by_hand())
    with pytest.raises(KernelLacksError, match="neither soft caps nor sinks"):
        kernel(*drawn(layout, len(layout)), scoring)


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


@pytest.mark.parametrize(("window", "chunk"), [(None, None), (150, None), (None, 256), (None, 100)])
@pytest.mark.parametrize("asking", ["all", "some"])
def test_the_block_mask_is_the_one_that_trying_every_pair_gives(asking, window, chunk):
    from torch.nn.attention.flex_attention import create_block_mask

    layout = large_forest()
    queries, positions = queries_of(layout, 0, asking)
    ours = FlexKernel(queries, CPU).block_mask(window, chunk)
    theirs = create_block_mask(ours.mask_mod, 1, 1, len(positions), len(layout), device="cpu", BLOCK_SIZE=BLOCK)
    seen = attention_mask(layout)[positions]
    if window is not None:
        seen &= (layout.depth[positions][:, None] - layout.depth[None, :]) < window
    if chunk is not None:
        seen &= layout.depth[positions][:, None] // chunk == layout.depth[None, :] // chunk
    assert bool((dense(ours, whole=True) <= dense(theirs, whole=True)).all())
    visited, needed = dense(ours, whole=False), dense(theirs, whole=False)
    assert bool((visited >= needed).all())
    if asking == "all" and window is None and chunk is None:
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


def test_every_kind_of_call_of_flex_attention_may_be_compiled():
    """With torch's own limit, 8, a model with a window has used it up; what comes after would be an error."""
    with torch._dynamo.config.patch(recompile_limit=8):
        cuda_kernels._compiled.cache_clear()
        cuda_kernels._compiled()
        assert torch._dynamo.config.recompile_limit == cuda_kernels.FLEX_VARIANTS


@pytest.mark.parametrize("scoring", [Scoring(softcap=2.0), Scoring(window=7, softcap=3.0), with_sinks(Scoring())])
def test_flex_attention_is_traced_as_a_whole_in_training(scoring, monkeypatch):
    """A soft cap whose value is not known while the graph is made ends tracing where there are gradients."""
    from torch.nn.attention import flex_attention as of_torch

    monkeypatch.setattr(of_torch, "_validate_device", lambda *_: None)  # it refuses gradients on a CPU
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    cuda_kernels._compiled.cache_clear()
    layout = layout_of(0)
    queries, positions = queries_of(layout, 0, "all")
    tensors = drawn(layout, len(positions))
    with torch._dynamo.config.patch(specialize_float=False):
        monkeypatch.setattr(cuda_kernels, "flex_attention", cuda_kernels._compiled())
        output = FlexKernel(queries, CPU)(*tensors, scoring)
    cuda_kernels._compiled.cache_clear()
    assert float((output - plain(layout, positions, scoring, tensors)).detach().abs().max()) <= 2e-6
