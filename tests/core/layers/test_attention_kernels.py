"""Every way to compute attention on a prefix tree, held against plain attention under the mask written out."""

from typing import get_args

import pytest
import torch
from attention_cases import (
    CPU,
    check,
    drawn,
    layout_of,
    operators_by_hand,
    queries_of,
    with_sinks,
)

from critic_train.layers import sdpa_kernels
from critic_train.layers.attention import KERNELS, TreeAttention, TreeUnsupportedError, tree_attention
from critic_train.layers.attention_kernel import KernelLacksError, Scoring
from critic_train.layers.cuda_kernels import VarlenKernel
from critic_train.layers.sdpa_kernels import CpuFlashKernel, SdpaKernel
from critic_train.settings import Attention

KERNELS_BY_HAND = {
    "sdpa": lambda queries: SdpaKernel(queries, CPU),
    "flash": CpuFlashKernel,
    "varlen": lambda queries: VarlenKernel(queries, CPU, operators=operators_by_hand()),
}
SCORINGS = {
    "plain": Scoring(),
    "window 1": Scoring(window=1),
    "window 5": Scoring(window=5),
    "chunk 1": Scoring(chunk=1),
    "chunk 6": Scoring(chunk=6),
    "softcap": Scoring(softcap=2.0),
    "softcap and window": Scoring(softcap=2.0, window=5),
    "sinks": with_sinks(Scoring()),
    "sinks and window": with_sinks(Scoring(window=5)),
    "sinks, softcap and chunk": with_sinks(Scoring(softcap=2.0, chunk=6)),
}


@pytest.mark.parametrize("asking", ["all", "some"])
@pytest.mark.parametrize("seed", [0, 2])
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("name", KERNELS_BY_HAND)
def test_kernels_are_plain_attention_and_all_that_layers_ask_for(name, scoring, seed, asking):
    layout = layout_of(seed)
    queries, positions = queries_of(layout, seed, asking)
    asked = SCORINGS[scoring]
    lacks = {"flash": asked.softcap, "varlen": asked.softcap or asked.sinks}
    if lacks.get(name) is not None:
        with pytest.raises(KernelLacksError):
            KERNELS_BY_HAND[name](queries)(*drawn(layout, len(positions)), asked)
    else:
        check(KERNELS_BY_HAND[name](queries), layout, positions, asked)


@pytest.mark.parametrize("block", [1, 3])
def test_blocks_of_any_size_see_the_same(block, monkeypatch):
    monkeypatch.setattr(sdpa_kernels, "SMALLEST_BLOCK", block)
    monkeypatch.setattr(sdpa_kernels, "LARGEST_BLOCK", block)
    layout = layout_of(0)
    queries, positions = queries_of(layout, 0, "some")
    check(CpuFlashKernel(queries), layout, positions, with_sinks(Scoring(window=7)))
    check(SdpaKernel(queries, CPU), layout, positions, with_sinks(Scoring(window=7, softcap=2.0)))


@pytest.mark.parametrize("value_width", [8, 24])
@pytest.mark.parametrize("scoring", ["plain", "window 5", "softcap", "sinks"])
def test_values_may_have_heads_of_another_size_than_keys(scoring, value_width):
    layout = layout_of(0)
    queries, positions = queries_of(layout, 0, "some")
    check(TreeAttention(queries, CPU, KERNELS["sdpa"].build), layout, positions, SCORINGS[scoring], value_width)


def test_every_value_of_the_flag_but_auto_names_a_kernel():
    assert set(get_args(Attention)) == {"auto", *KERNELS}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tree_plan": None}, "no arguments but its own"),
        ({"position_bias": torch.zeros(1)}, "^position_bias$"),
        ({"dropout": 0.1}, "^dropout$"),
        ({"attention_mask": torch.zeros(1)}, "a mask that is not plain causal"),
    ],
)
def test_what_attention_on_a_tree_lacks_is_named(changes, reason):
    query = torch.zeros(1, 2, 5, 4)
    arguments = {"attention_mask": None, "tree_plan": None} | changes
    with pytest.raises(TreeUnsupportedError, match=reason):
        tree_attention(torch.nn.Linear(1, 1), query, query, query, **arguments)
