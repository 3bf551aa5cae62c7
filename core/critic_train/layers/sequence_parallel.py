"""Positions of a micro-batch cut over several ranks: before attention they are exchanged for heads, and back after it.

DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509). Embeddings, norms and MLPs see the positions of their rank
alone. Attention, recurrences and convolutions mix positions but neither heads nor channels: an all-to-all before them
gives each rank all positions of some heads, on which they compute what they compute on one process, and one after
them gives each rank back all heads of its positions. So the tree's mask, its kernels and their exactness stay.

Shapes: N ranks, S positions of the layout, a multiple of N, and C = S / N of them on each rank; or, where the last
layer computes some only, Q of all and those of Q that are among a rank's C.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from critic_train.layers.attention_kernel import Scoring
from critic_train.layers.prefix_tree import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRanks:
    """The ranks that compute each micro-batch together, of which this is one.

    Attributes:
        group: theirs.
        size: N.
        rank: this one's number among them.
    """

    group: dist.ProcessGroup
    size: int
    rank: int

    def span(self, positions: int) -> Span:
        """The positions of this rank, of a multiple of N."""
        count = positions // self.size
        return self.rank * count, (self.rank + 1) * count

    def bounds(self, positions: int) -> NDArray[np.int64]:
        """int64 [N + 1], where each rank's positions begin and end."""
        return np.arange(self.size + 1) * (positions // self.size)

    def gathered(self, rows: Tensor, at: Tensor, count: int) -> Tensor:
        """[count, ...]: the rows of all ranks, [m, ...] on each, at their places in all, int64 [m]; differentiable."""
        gathered: Tensor = _Gathered.apply(rows, at, count, self.group)  # type: ignore[no-untyped-call]
        return gathered


class _Gathered(torch.autograd.Function):
    """What each rank makes of all rows has a gradient by those of every rank."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, at: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(at)
        ctx.group = group
        gathered = rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, at, rows)
        dist.all_reduce(gathered, group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None, None


class _AllToAll(torch.autograd.Function):
    """An all-to-all whose gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradient.contiguous(), ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    output = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(output, rows, received, sent, group=group)
    return output


@dataclass(frozen=True, slots=True)
class Exchange:
    """Positions for heads, and back.

    Attributes:
        ranks: N of them.
        counts: how many positions each rank has.
    """

    ranks: SequenceRanks
    counts: list[int]

    @classmethod
    def of_all(cls, ranks: SequenceRanks, positions: int) -> "Exchange":
        """Of all positions of a layout, a multiple of N."""
        return cls(ranks, [positions // ranks.size] * ranks.size)

    def all_positions(self, rows: Tensor) -> Tensor:
        """[C, heads, ...] -> [S, heads / N, ...]: all positions of this rank's heads."""
        size, own = self.ranks.size, len(rows)
        by_rank: Tensor = rows.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1)
        exchanged: Tensor = _AllToAll.apply(by_rank.contiguous(), [own] * size, self.counts, self.ranks.group)  # type: ignore[no-untyped-call]
        return exchanged

    def all_heads(self, rows: Tensor) -> Tensor:
        """[S, heads / N, ...] -> [C, heads, ...]: all heads of this rank's positions."""
        size, own = self.ranks.size, self.counts[self.ranks.rank]
        exchanged: Tensor = _AllToAll.apply(rows.contiguous(), self.counts, [own] * size, self.ranks.group)  # type: ignore[no-untyped-call]
        by_position: Tensor = exchanged.unflatten(0, (size, own)).transpose(0, 1)
        return by_position.flatten(1, 2)


@dataclass(frozen=True, slots=True)
class HeadShares:
    """How heads are shared out over N ranks, so that each rank's queries find their keys on it.

    Key and value heads fewer than N are copied: each copy serves a part of the queries of its head. Heads that N does
    not divide are filled up with heads of zeros, whose output is dropped.

    Attributes:
        heads: of the queries, a multiple of `kv_heads`.
        kv_heads: of keys and values.
        ranks: N.
    """

    heads: int
    kv_heads: int
    ranks: int

    def _filled(self) -> tuple[int, int, int]:
        """(key heads with those filled up, copies of each, queries of each with those filled up): the least work."""
        group, ways = self.heads // self.kv_heads, list[tuple[int, int, int]]()
        for kv_heads in range(self.kv_heads, self.kv_heads + self.ranks):
            copies = int(np.lcm(kv_heads, self.ranks)) // kv_heads
            ways.append((kv_heads, copies, -(-group // copies) * copies))
        return min(ways, key=lambda each: (each[0] * each[2], each[0] * each[1]))

    @property
    def computed(self) -> int:
        """Heads that are computed on all ranks together, those of zeros among them."""
        kv_heads, _, group = self._filled()
        return kv_heads * group

    @property
    def computed_keys(self) -> int:
        """Heads of keys on all ranks together, copies and those of zeros among them."""
        kv_heads, copies, _ = self._filled()
        return kv_heads * copies

    def queries(self, rows: Tensor) -> Tensor:
        """[C, heads, ...] -> [C, heads filled up, ...]."""
        kv_heads, _, group = self._filled()
        by_key = rows.unflatten(1, (self.kv_heads, -1))
        return _filled_up(_filled_up(by_key, 2, group), 1, kv_heads).flatten(1, 2)

    def keys(self, rows: Tensor) -> Tensor:
        """[C, kv_heads, ...] -> [C, kv_heads filled up and copied, ...]."""
        kv_heads, copies, _ = self._filled()
        rows = _filled_up(rows, 1, kv_heads)
        return rows if copies == 1 else rows.repeat_interleave(copies, dim=1)

    def without_filling(self, rows: Tensor) -> Tensor:
        """[C, heads filled up, ...] -> [C, heads, ...]."""
        kv_heads, _, group = self._filled()
        by_key: Tensor = rows.unflatten(1, (kv_heads, group))
        return by_key[:, : self.kv_heads, : self.heads // self.kv_heads].flatten(1, 2)

    def of_rank(self, parameter: Tensor, rank: int) -> Tensor:
        """[heads, ...] -> [heads filled up / N, ...]: what a rank's heads have of a parameter."""
        return self.queries(parameter[None])[0].chunk(self.ranks)[rank]


def _filled_up(rows: Tensor, dim: int, size: int) -> Tensor:
    missing = size - rows.shape[dim]
    return F.pad(rows, (0, 0) * (rows.dim() - dim - 1) + (0, missing)) if missing else rows


@dataclass(frozen=True, slots=True)
class ExchangedAttention:
    """Queries, keys and values of all positions, of this rank's heads; and the way back.

    Attributes:
        query: [1, heads filled up / N, Q, head_dim].
        key: [1, kv_heads filled up and copied / N, S, head_dim].
        value: [1, the same, S, value_dim].
        scoring: with the sinks of these heads.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scoring: Scoring
    _shares: HeadShares
    _exchange: Exchange

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, *, queries: Exchange, keys: Exchange
    ) -> "ExchangedAttention":
        """Exchange the positions of a layer's arguments for heads.

        Args:
            query: [1, heads, queries of this rank, head_dim].
            key: [1, kv_heads, C, head_dim].
            value: [1, kv_heads, C, value_dim].
            scoring: of the layer.
            queries: of the positions that are queries.
            keys: of all positions.
        """
        ranks = keys.ranks
        shares = HeadShares(query.shape[1], key.shape[1], ranks.size)
        sinks = None if scoring.sinks is None else shares.of_rank(scoring.sinks, ranks.rank)
        return cls(
            _by_head(queries.all_positions(shares.queries(_by_position(query)))),
            _by_head(keys.all_positions(shares.keys(_by_position(key)))),
            _by_head(keys.all_positions(shares.keys(_by_position(value)))),
            replace(scoring, sinks=sinks),
            shares,
            queries,
        )

    def back(self, output: Tensor) -> Tensor:
        """[1, Q, heads filled up / N, value_dim] -> [1, queries of this rank, heads, value_dim]."""
        return self._shares.without_filling(self._exchange.all_heads(output[0]))[None]


def _by_position(heads: Tensor) -> Tensor:
    """[1, heads, positions, size] -> [positions, heads, size]."""
    return heads[0].transpose(0, 1)


def _by_head(rows: Tensor) -> Tensor:
    """[positions, heads, size] -> [1, heads, positions, size]."""
    return rows.transpose(0, 1)[None]


def counts_between(positions: NDArray[np.int64], bounds: NDArray[np.int64]) -> list[int]:
    """How many of some positions, int64 [Q] ascending, each rank has."""
    counts: list[int] = np.diff(np.searchsorted(positions, bounds)).tolist()
    return counts


def one_on_each_rank(positions: NDArray[np.int64], bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Some positions, int64 [Q] ascending, and the first one of each rank that has none: no layer takes nothing."""
    missing = bounds[:-1][np.asarray(counts_between(positions, bounds)) == 0]
    return np.sort(np.concatenate([positions, missing]))


BY_LENGTH = ("dynamic", "longrope")
"""Kinds of rotary embeddings whose frequencies depend on the largest position that they are given."""


def share_frequencies(trunk: nn.Module, ranks: SequenceRanks) -> list[RemovableHandle]:
    """Have rotary embeddings whose frequencies depend on the longest rollout go by that of all ranks.

    Returns:
        What undoes it.
    """
    handles = []
    for module in trunk.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(name in str(kind) for kind in kinds for name in BY_LENGTH):
            before = partial(_with_largest_position, ranks)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(_without_largest_position))
    return handles


def _with_largest_position(
    ranks: SequenceRanks, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    position_ids: Tensor = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    largest = position_ids.max().reshape(1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=ranks.group)
    extended = torch.cat([position_ids, largest.expand(*position_ids.shape[:-1], 1)], dim=-1)
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": extended}
    return (args[0], extended, *args[2:]), kwargs


def _without_largest_position(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part[..., :-1, :] for part in output)
