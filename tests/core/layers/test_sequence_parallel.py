"""Positions cut over ranks: values and gradients are those of one process, whatever the heads, layers and lengths."""

import numpy as np
import pytest
import torch
from architectures import LONGROPE, ROWS_ALONE, TEXT
from ranks import on_ranks
from sequence_work import differences

from critic_train.layers.sequence_parallel import HeadShares, one_on_each_rank

SHORT = {**LONGROPE, "original_max_position_embeddings": 64}
QUICK = [
    ("Llama", {"num_key_value_heads": 2}, "long prompts"),  # 2 key heads, 4 for the queries; narrowed
    ("Llama", {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 112}, "branching"),
    ("Llama", {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48}, "branching"),
    ("Mistral", {"sliding_window": 8}, "branching"),
    ("GPT-OSS", {}, "long prompts"),  # windows, and sinks of each head
    ("DeepSeek-V3, Kimi-K2, Moonlight", {}, "branching"),  # values of another size than keys
    ("Qwen3.5 (text)", {}, "branching"),  # gated delta rule, and a convolution
    ("Falcon-H1", {}, "long prompts"),  # Mamba-2
    (
        "Phi-3.5, Phi-4-mini (longrope)",
        {"original_max_position_embeddings": 64, "rope_parameters": SHORT},
        "long prompts",
    ),
    ("LFM2", {}, "branching"),  # a convolution alone
]


def assert_as_alone(found: list[dict[str, float]] | dict[str, str], cases: list[tuple[str, dict[str, object], str]]):
    assert isinstance(found, list), found
    for case, difference in zip(cases, found, strict=True):
        assert difference["values"] <= 1e-5, case
        # One token: its softmax is 1, and the gradients of queries and keys are nothing but rounding.
        assert difference["gradients"] <= (1e-3 if case[2] == "tiny" else 1e-5), case
        assert difference["check"] <= 1e-5, case


@pytest.mark.parametrize("size", [2, 4])
def test_values_and_gradients_are_those_of_one_process(size):
    cases = [*QUICK, ("Llama", {}, "tiny")]  # two tokens: fewer than ranks
    for found in on_ranks(size, differences, size, cases):
        assert_as_alone(found, cases)
        assert found[0]["narrowed"]
        # 300 of the prompts, 482 of the responses: 196 on each of four, of which two are nobody's.
        assert found[0]["computed"] == {2: 391, 4: 196}[size]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_every_architecture_whose_prefixes_are_shared_can_be_cut(size):
    cases = [(name, {}, data) for name in TEXT if name not in ROWS_ALONE for data in ("branching", "long prompts")]
    for found in on_ranks(size, differences, size, cases):
        assert_as_alone(found, cases)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[positions, heads, size] by hand, each query head with the key head of its group; every position sees all."""
    copies = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)
    weights = torch.einsum("qhd,khd->hqk", query, key).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (8, 1), (14, 2), (9, 3), (28, 4), (5, 5), (1, 1)])
def test_each_ranks_heads_find_their_keys_on_it(heads, kv_heads, ranks):
    """What ranks compute from their shares alone, put together, is attention of all heads."""
    shares, draw = HeadShares(heads, kv_heads, ranks), torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(6, count, 4, generator=draw) for count in (heads, kv_heads, kv_heads))
    spread = (shares.queries(query), shares.keys(key), shares.keys(value))
    parts = [[made.chunk(ranks, dim=1)[rank] for made in spread] for rank in range(ranks)]
    together = torch.cat([attention(*part) for part in parts], dim=1)
    torch.testing.assert_close(shares.without_filling(together), attention(query, key, value))
    assert shares.computed == together.shape[1]
    parameter = torch.arange(heads * 2.0).view(heads, 2)
    by_rank = torch.cat([shares.of_rank(parameter, rank) for rank in range(ranks)])
    torch.testing.assert_close(shares.without_filling(by_rank[None])[0], parameter)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "computed"),
    [(32, 8, 8, 32), (32, 8, 64, 64), (28, 4, 8, 32), (64, 8, 16, 64), (14, 2, 4, 16), (9, 9, 2, 10), (9, 3, 2, 12)],
)
def test_heads_that_ranks_do_not_divide_are_filled_up_with_as_few_as_possible(heads, kv_heads, ranks, computed):
    assert HeadShares(heads, kv_heads, ranks).computed == computed


def test_no_rank_is_left_without_a_position_to_compute():
    bounds = np.asarray([0, 4, 8, 12])
    assert one_on_each_rank(np.asarray([5, 6]), bounds).tolist() == [0, 5, 6, 8]
    assert one_on_each_rank(np.asarray([0, 7, 9]), bounds).tolist() == [0, 7, 9]
