"""Attention through variable-length flash attention: CUDA, half precision.

Every run of queries is a sequence; its keys are its path from the root, gathered. The kernel aligns its causal mask at
the lower right, where the last query meets the last key, which is what a run at the end of its path needs; a window
then counts in the rollout. The price is one copy of the keys and values of every path.

Attention through FlexAttention, with the block mask made on the device from `end` alone.

A block of keys is visited by a block of queries iff its first position is not after the last query and its largest
`end` is beyond the first query; it is seen whole iff its last position is not after the first query and its smallest
`end` is beyond the last query. Two reductions a block decide both; no S x S mask is evaluated. Windows count in the
rollout, by depth.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from critic_train.model.queries import Queries
from critic_train.rollouts import offsets_from_lengths, repeat_by_length


class VarlenKernel:
    """A kernel (see `queries.Kernel`).

    Args:
        queries: who asks.
        device: where the trunk is.
        attend: called as `torch.nn.attention.varlen.varlen_attn` is, and by default that.

    Attributes:
        paths: int64 [K] on the device, the positions of all paths, run after run.
        query_offsets: int32 [runs + 1], the first query of each run.
        key_offsets: int32 [runs + 1], the first entry of `paths` of each run.
    """

    def __init__(self, queries: Queries, device: torch.device, attend: Callable[..., Any] | None = None) -> None:
        pieces = np.asarray([piece for run in queries.spans for piece in run.path], dtype=np.int64)
        own = np.asarray([run.queries[1] - run.queries[0] for run in queries.spans], dtype=np.int64)
        path = np.asarray([sum(stop - start for start, stop in run.path) for run in queries.spans], dtype=np.int64)
        self.paths = torch.from_numpy(repeat_by_length(pieces[:, 0], pieces[:, 1] - pieces[:, 0])).to(device)
        self.query_offsets = torch.from_numpy(offsets_from_lengths(own).astype(np.int32)).to(device)
        self.key_offsets = torch.from_numpy(offsets_from_lengths(path).astype(np.int32)).to(device)
        self._longest = int(own.max()), int(path.max())
        self._attend = attend or _varlen_attn()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None) -> Tensor:
        """See `queries.Kernel`."""
        flat = query[0].transpose(0, 1)
        keys = key[0].transpose(0, 1).index_select(0, self.paths)
        values = value[0].transpose(0, 1).index_select(0, self.paths)
        output: Tensor = self._attend(
            flat.contiguous(),
            keys,
            values,
            self.query_offsets,
            self.key_offsets,
            *self._longest,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output[None]


def available(device: torch.device) -> bool:
    """Whether torch has variable-length attention and the device can run it (compute capability 8.0 on)."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        _varlen_attn()
    except ImportError:
        return False
    return True


def _varlen_attn() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        return varlen_attn
    return partial(_unasked, varlen_attn)


def _unasked(attend: Callable[..., Any], *arguments: Any, enable_gqa: bool, **more: Any) -> Any:
    """Up to torch 2.11 the kernel shares heads of keys among those of queries whenever there are fewer of them."""
    return attend(*arguments, **more)


BLOCK = 128
"""Positions a side of a block."""


class FlexKernel:
    """A kernel (see `queries.Kernel`). On CUDA it is compiled; on a CPU it runs eagerly, without a backward pass.

    Args:
        queries: who asks.
        device: where the trunk is.
    """

    def __init__(self, queries: Queries, device: torch.device) -> None:
        layout = queries.layout
        self._end = torch.from_numpy(layout.end).to(device)
        self._depth = torch.from_numpy(layout.depth).to(device)
        places = torch.arange(len(layout), device=device)
        self._positions = places if queries.positions is None else torch.from_numpy(queries.positions).to(device)
        self._masks: dict[int | None, BlockMask] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None) -> Tensor:
        """See `queries.Kernel`."""
        attend: Any = _compiled() if query.is_cuda else flex_attention
        grouped = query.shape[1] != key.shape[1]
        output: Tensor = attend(query, key, value, block_mask=self.block_mask(window), scale=scale, enable_gqa=grouped)
        return output.transpose(1, 2)

    def block_mask(self, window: int | None) -> BlockMask:
        """Which blocks are visited, which of them are seen whole, and the mask for the others."""
        if window not in self._masks:
            visited, whole = self._blocks(window)
            partial, partial_blocks = _listed(visited & ~whole)
            full, full_blocks = _listed(whole)
            self._masks[window] = BlockMask.from_kv_blocks(
                partial,
                partial_blocks,
                full,
                full_blocks,
                BLOCK_SIZE=BLOCK,
                mask_mod=self._mask(window),
                seq_lengths=(len(self._positions), len(self._end)),
            )
        return self._masks[window]

    def _mask(self, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        end, depth, positions = self._end, self._depth, self._positions

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            position = positions[query]
            seen = (key <= position) & (position < end[key])
            return seen if window is None else seen & (depth[position] - depth[key] < window)

        return sees

    def _blocks(self, window: int | None) -> tuple[Tensor, Tensor]:
        """(bool, bool) [blocks of queries, blocks of keys]: visited, and seen whole."""
        keys = torch.arange(len(self._end), device=self._end.device)
        first_query, last_query = _extremes(self._positions)
        first_key, last_key = _extremes(keys)
        smallest_end, largest_end = _extremes(self._end)
        visited = (first_key <= last_query[:, None]) & (largest_end > first_query[:, None])
        whole = (last_key <= first_query[:, None]) & (smallest_end > last_query[:, None])
        if window is not None:
            shallow_query, deep_query = _extremes(self._depth[self._positions])
            shallow_key, deep_key = _extremes(self._depth)
            visited &= shallow_query[:, None] - deep_key < window
            whole &= deep_query[:, None] - shallow_key < window
        # A last block that is not full is never seen whole: what lies beyond the end is masked.
        if len(self._positions) % BLOCK:
            whole[-1] = False
        if len(keys) % BLOCK:
            whole[:, -1] = False
        return visited, whole


def _extremes(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest number of every block; the last block repeats its last number to be full."""
    missing = -len(numbers) % BLOCK
    blocks = torch.cat([numbers, numbers[-1:].expand(missing)]).view(-1, BLOCK)
    return blocks.amin(1), blocks.amax(1)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries takes, and which, first the chosen ones: int32 [1, 1, ...]."""
    counts = chosen.sum(1, dtype=torch.int32)
    order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], order[None, None].contiguous()


@cache
def _compiled() -> Any:
    # Forests differ in size from one micro-batch to the next.
    return torch.compile(flex_attention, dynamic=True)
