"""Attention of a span as it is computed on CUDA, here on a CPU: the formula, heads that share keys, masks in blocks."""

import pytest
import torch

from critic_train.layers import masked_attention
from critic_train.layers.masked_attention import attend_without_scores, lower_right_mask


@pytest.mark.parametrize(("window", "queries"), [(None, 50), (50, 30), (7, 30)])
@pytest.mark.parametrize("pairs", [2**27, 400])
def test_a_long_mask_is_made_in_blocks_and_the_result_is_the_formula(pairs, window, queries, monkeypatch):
    monkeypatch.setattr(masked_attention, "MOST_MASKED_PAIRS", pairs)
    monkeypatch.setattr(masked_attention, "FEWEST_QUERIES", 4)
    fixed = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, queries, 8, generator=fixed)
    key, value = (torch.randn(1, 2, 50, 8, generator=fixed) for _ in range(2))
    made = []

    def mask_of(*size):
        made.append(size[:2])
        return lower_right_mask(*size, query.device)

    in_blocks = []
    monkeypatch.setattr(
        masked_attention,
        "lower_right_mask",
        lambda *size: in_blocks.append(size[:2]) or lower_right_mask(*size),
    )
    actual = attend_without_scores(query, key, value, None, window, mask_of)
    at = torch.arange(50 - queries, 50)[:, None] - torch.arange(50)[None]
    mask = (at >= 0) & (at < (window or 50))
    scores = (query @ key.repeat_interleave(2, 1).transpose(2, 3)) * 8**-0.5
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
    assert torch.allclose(actual, expected, atol=1e-5)
    if window is None:
        assert not made + in_blocks
    elif pairs > 400:
        assert (made, in_blocks) == ([(30, 50)], [])
    else:
        assert len(in_blocks) == 4
        assert max(rows * keys for rows, keys in in_blocks) <= 400
