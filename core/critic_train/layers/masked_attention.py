"""Scaled-dot-product attention of a span of queries on CUDA, by operators that write no scores out.

torch has such operators for heads that share keys only in half precision and without a mask. Else it would write
heads x queries x keys numbers: 48 GiB for one rollout of 32,768 tokens and 12 heads.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_MASKED_PAIRS = 2**27
"""Pairs of a mask that exists at once; torch makes float32 of it."""

FEWEST_QUERIES = 128
"""Under a mask that is made in blocks."""


def repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with one head for each of the query's.

    Args:
        query: [1, heads, Q, head_dim].
        key: [1, kv_heads, K, head_dim].
        value: [1, kv_heads, K, head_dim].

    Returns:
        [1, heads, K, head_dim] each.
    """
    group = query.shape[1] // key.shape[1]
    return key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)


def lower_right_mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """bool [queries, keys]: causal, aligned at the lower right, at most `window` keys back."""
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return ones.tril_(keys - queries).triu_(keys - queries - window + 1)


def attend_without_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    window: int | None,
    mask_of: Callable[[int, int, int], Tensor],
) -> Tensor:
    """Attention whose last query meets the last key.

    Args:
        query: [1, heads, Q, head_dim].
        key: [1, kv_heads, K, head_dim].
        value: likewise.
        scale: factor on the scores.
        window: keys that a query sees, its own included; None for plain causal attention, where Q is K.
        mask_of: the mask of (queries, keys, window), which may be kept for the next layer.

    Returns:
        [1, heads, Q, head_dim].
    """
    if query.shape[1] != key.shape[1] and (window is not None or query.dtype == torch.float32):
        key, value = repeat_heads(query, key, value)
    if window is None:
        shared = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=shared)
    queries, keys = query.shape[2], key.shape[2]
    rows = max(FEWEST_QUERIES, MOST_MASKED_PAIRS // keys)
    blocks = []
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        seen = keys - queries + stop
        if rows >= queries:
            mask = mask_of(queries, keys, window)
        else:  # too much to be kept
            mask = lower_right_mask(stop - start, seen, window, query.device)
        part, own_keys, own_values = query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen]
        blocks.append(F.scaled_dot_product_attention(part, own_keys, own_values, attn_mask=mask, scale=scale))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
