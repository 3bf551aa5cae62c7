"""Attention over a forest, handed to transformers under our own name.

transformers looks attention functions up by name and passes unknown keyword arguments through, so a trunk that was
asked for `NAME` and called with `forest_plan=...` computes on a forest without any change to its code. Because no
mask function is registered under `NAME`, transformers builds no mask of its own.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface

from critic_train.model.forest import Forest
from critic_train.model.kernels.choosing import kernel_of
from critic_train.model.kernels.queries import Kernel, Queries, all_queries, queries_at, without_short_gaps
from critic_train.settings import Attention

NAME = "critic_train_forest"

UNSUPPORTED = ("softcap", "s_aux")
"""Arguments that change the attention's arithmetic and that the forest path does not honour."""


class ForestUnsupportedError(Exception):
    """The architecture asks of attention something that the forest path cannot give."""


class ForestAttention:
    """Attention of some positions of a forest to their ancestors and themselves, prepared once for all layers.

    Args:
        queries: who asks.
        device: where the trunk is.
        kernel: sdpa, flex or varlen.
    """

    def __init__(self, queries: Queries, device: torch.device, kernel: Attention) -> None:
        self._queries = queries
        self._device = device
        self._name = kernel
        self._longest = int(queries.forest.depth.max()) + 1
        self._kernels: dict[bool, Kernel] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None) -> Tensor:
        """See `queries.Kernel`."""
        windowed = window is not None and window < self._longest
        if windowed not in self._kernels:
            self._kernels[windowed] = kernel_of(self._name, self._queries, self._device, windowed=windowed)
        return self._kernels[windowed](query, key, value, window if windowed else None, scale)


class ForestPlan:
    """What the layers of a trunk need to know of a forest.

    Args:
        forest: the layout.
        read: int64 [R], ascending: the positions whose last state is read.
        device: where the trunk is.
        kernel: sdpa, flex or varlen: how attention is computed.

    Attributes:
        attend: the attention of all positions.
        narrowed: the attention of the positions that the last layer needs to compute; None where those are all,
            or none is read.
        kept_positions: int64 [Q], those positions, ascending.
        kept: the same on the device; None where they are all.
    """

    def __init__(
        self, forest: Forest, read: NDArray[np.int64], device: torch.device, kernel: Attention = "sdpa"
    ) -> None:
        self.attend = ForestAttention(all_queries(forest), device, kernel)
        self.narrowed: ForestAttention | None = None
        self.kept: Tensor | None = None
        # Where nothing is read (a rank without work) there is nothing to narrow to.
        self.kept_positions = without_short_gaps(forest, read) if len(read) else np.arange(len(forest))
        if 0 < len(self.kept_positions) < len(forest):
            self.narrowed = ForestAttention(queries_at(forest, self.kept_positions), device, kernel)
            self.kept = torch.from_numpy(self.kept_positions).to(device, non_blocking=True)


@torch.compiler.disable  # type: ignore[untyped-decorator]
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
        module: the calling attention layer.
        query: [1, heads, Q, head_dim]; Q is S, or the narrowed plan's.
        key: [1, kv_heads, S, head_dim].
        value: [1, kv_heads, S, head_dim].
        attention_mask: must be None: the plan is the mask.
        forest_plan: the layout.
        scaling: factor on the scores; None means 1/sqrt(head_dim).
        dropout: must be 0.
        sliding_window: keys further back than this in the rollout are not seen.

    Returns:
        ([1, Q, heads, head_dim], None), as transformers expects.

    Raises:
        ForestUnsupportedError: the layer asks for more than plain (or windowed) causal attention.
    """
    asked = [name for name in UNSUPPORTED if other.get(name) is not None]
    if asked or dropout or attention_mask is not None or not getattr(module, "is_causal", True):
        raise ForestUnsupportedError(", ".join(asked) or "attention that is not plain causal")
    attend = forest_plan.attend
    if query.shape[2] != key.shape[2]:
        assert forest_plan.narrowed is not None
        attend = forest_plan.narrowed
    # Rotary embeddings may promote queries and keys; all three must agree for the fused kernels.
    return attend(query.to(value.dtype), key.to(value.dtype), value, sliding_window, scaling), None


AttentionInterface.register(NAME, forest_attention)
