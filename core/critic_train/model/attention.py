"""Attention over a forest, handed to transformers under our own name.

transformers looks attention functions up by name and passes unknown keyword arguments through, so a trunk that was
asked for `NAME` and called with `forest_plan=...` computes on a forest without any change to its code. Because no
mask function is registered under `NAME`, transformers builds no mask of its own.

Segment by segment: the queries are one rollout's own tokens, the keys are its path from the root. The last query
sees the whole path, so the causal mask is aligned at the lower right.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from critic_train.model.forest import Forest

NAME = "critic_train_forest"

UNSUPPORTED = ("softcap", "s_aux")
"""Arguments that change the attention's arithmetic and that the forest path does not honour."""


class ForestUnsupportedError(Exception):
    """The architecture asks of attention something that the forest path cannot give."""


class ForestPlan:
    """What attention needs to know of a forest, prepared once for all layers.

    Keys and values are split into pieces at every point where a segment starts or a path is cut; a segment's keys
    are the pieces of its path, concatenated. Splitting once and concatenating keeps the backward pass free of
    scatter-adds into the full tensor.

    Args:
        forest: the layout.
        device: where the masks are made.
    """

    def __init__(self, forest: Forest, device: torch.device) -> None:
        cuts = {len(forest)}
        for segment in forest.segments:
            for start, stop in segment.path:
                cuts.update((start, stop))
        bounds = sorted(cuts | {0})
        piece_of = {start: piece for piece, start in enumerate(bounds)}
        self.piece_sizes = [stop - start for start, stop in pairwise(bounds)]
        self.query_sizes = [segment.own_length for segment in forest.segments]
        self.paths = [
            [piece for start, stop in segment.path for piece in range(piece_of[start], piece_of[stop])]
            for segment in forest.segments
        ]
        self.path_lengths = [segment.path_length for segment in forest.segments]
        self._device = device
        self._masks: dict[tuple[int, int, int], Tensor] = {}

    def mask(self, queries: int, keys: int, window: int) -> Tensor:
        """bool [queries, keys]: causal, aligned at the lower right, at most `window` keys back."""
        key = (queries, keys, window)
        if key not in self._masks:
            ones = torch.ones(queries, keys, dtype=torch.bool, device=self._device)
            self._masks[key] = ones.tril_(keys - queries).triu_(keys - queries - window + 1)
        return self._masks[key]


def forest_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    forest_plan: ForestPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attention of every position to its ancestors and itself.

    Args:
        module: the calling attention layer (transformers passes it; unused).
        query: [1, heads, S, head_dim].
        key: [1, kv_heads, S, head_dim].
        value: [1, kv_heads, S, head_dim].
        attention_mask: must be None: the plan is the mask.
        forest_plan: the layout.
        scaling: factor on the scores; None means 1/sqrt(head_dim).
        dropout: must be 0.
        sliding_window: keys further back than this in the rollout are not seen.

    Returns:
        ([1, S, heads, head_dim], None), as transformers expects.

    Raises:
        ForestUnsupportedError: the layer asks for more than plain (or windowed) causal attention.
    """
    asked = [name for name in UNSUPPORTED if other.get(name) is not None]
    if asked or dropout or attention_mask is not None or not getattr(module, "is_causal", True):
        raise ForestUnsupportedError(", ".join(asked) or "attention that is not plain causal")
    # Rotary embeddings may promote queries and keys; all three must agree for the fused kernels.
    queries = query.to(value.dtype).split(forest_plan.query_sizes, dim=2)
    keys = key.to(value.dtype).split(forest_plan.piece_sizes, dim=2)
    values = value.split(forest_plan.piece_sizes, dim=2)
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for own, path, length in zip(queries, forest_plan.paths, forest_plan.path_lengths, strict=True):
        window = length if sliding_window is None else min(sliding_window, length)
        alone = own.shape[2] == length and window == length
        outputs.append(
            F.scaled_dot_product_attention(
                own,
                _joined(keys, path),
                _joined(values, path),
                attn_mask=None if alone else forest_plan.mask(own.shape[2], length, window),
                is_causal=alone,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _joined(pieces: tuple[Tensor, ...], path: list[int]) -> Tensor:
    return pieces[path[0]] if len(path) == 1 else torch.cat([pieces[piece] for piece in path], dim=2)


AttentionInterface.register(NAME, forest_attention)
