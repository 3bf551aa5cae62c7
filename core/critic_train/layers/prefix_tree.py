"""The layout of a micro-batch as prefix trees: a prefix that several rollouts share is computed once.

The positions of the layout are the nodes of the rollouts' tries in depth-first order. Shapes, here and in the modules
that use a layout:

    n   rollouts of the micro-batch         m   of these, the rollouts that add positions, m <= n
    T   tokens of all rollouts              S   positions, S <= T

    input_ids [S]   the token at each position
    depth [S]       its index in its rollout, which is its position id
    end [S]         the exclusive end of the subtree below: position q may attend to k iff k <= q < end[k]

For the rollouts 1 2 3, 1 2 4 5 and 1 6:

    1 - 2 - 3            position    0 1 2 3 4 5
    |   ` - 4 - 5        input_ids   1 2 3 4 5 6
    ` - 6                depth       0 1 2 2 3 1
                         end         6 5 3 5 5 6

Rollouts are sorted by their tokens. Sorted neighbours have the longest common prefixes, so the trie follows from the
prefixes that neighbours have in common. `end` is the bound by columns of FlashMask (arXiv 2410.01359).
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from critic_train.rollouts import Rollouts, offsets_from_lengths, repeat_by_length

Span = tuple[int, int]
"""Positions start to stop - 1 of a layout, as (start, stop)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixOrder:
    """Rollouts in the order of a depth-first walk, and how much each shares with the one before it.

    Attributes:
        index: int64 [n], the rollouts of the batch in lexicographic order of their tokens.
        shared: int64 [n], tokens that rollout index[i] has in common with rollout index[i-1]; 0 for the first.
    """

    index: NDArray[np.int64]
    shared: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def part(self, members: NDArray[np.int64]) -> "PrefixOrder":
        """The order of some of the rollouts.

        Args:
            members: int64 [k], ascending indices into this order.
        """
        if not len(members):
            return PrefixOrder(index=self.index[:0], shared=self.shared[:0])
        # The common prefix of two sorted rollouts is the shortest one between the neighbours that lie between them.
        shortest = np.minimum.reduceat(self.shared[: members[-1] + 1], np.append(0, members[:-1] + 1))
        return PrefixOrder(index=self.index[members], shared=np.append(0, shortest[1:]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The positions that one rollout adds to the layout, and the path from the root to the last of them.

    Attributes:
        own: the positions that the rollout adds.
        path: the positions of all its tokens, as spans from the root on; `own` is their tail.
    """

    own: Span
    path: tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class TreeLayout:
    """The layout of n rollouts, T tokens, on S <= T positions. See the module's docstring.

    Attributes:
        input_ids: int64 [S], the token at each position.
        depth: int64 [S], position ids.
        end: int64 [S], exclusive end of the subtree below each position.
        token_positions: int64 [T], the position of every token of every rollout, rollouts in the order of the batch.
        segment_starts: int64 [m+1], the first position that each of the m rollouts adds, left to right, and S.
        path_spans: int64 [p, 2], (start, stop) of the spans that the paths of the m rollouts consist of, root first.
        path_offsets: int64 [m+1]; the path of segment s is path_spans[path_offsets[s]:path_offsets[s+1]].
    """

    input_ids: NDArray[np.int64]
    depth: NDArray[np.int64]
    end: NDArray[np.int64]
    token_positions: NDArray[np.int64]
    segment_starts: NDArray[np.int64]
    path_spans: NDArray[np.int64]
    path_offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """One segment for each rollout that adds positions, left to right."""
        spans: list[Span] = list(map(tuple, self.path_spans.tolist()))
        paths = [tuple(spans[first:last]) for first, last in pairwise(self.path_offsets.tolist())]
        owns = pairwise(self.segment_starts.tolist())
        return tuple(Segment(own=own, path=path) for own, path in zip(owns, paths, strict=True))


def prefix_order(rollouts: Rollouts) -> PrefixOrder:
    """Sort rollouts by their tokens, prompt and response alike, and measure what neighbours have in common."""
    offsets = rollouts.offsets.tolist()
    ids = rollouts.input_ids
    # Big-endian bytes compare as the token ids do, so that one memcmp compares two rollouts.
    keys = ids.astype(">u4").tobytes()
    rows = [keys[4 * start : 4 * stop] for start, stop in pairwise(offsets)]
    index = sorted(range(len(rows)), key=rows.__getitem__)
    shared = np.zeros(len(index), dtype=np.int64)
    for i, (one, other) in enumerate(pairwise(index), start=1):
        length = min(offsets[one + 1] - offsets[one], offsets[other + 1] - offsets[other])
        differs = ids[offsets[one] : offsets[one] + length] != ids[offsets[other] : offsets[other] + length]
        shared[i] = differs.argmax() if differs.any() else length
    return PrefixOrder(index=np.asarray(index, dtype=np.int64), shared=shared)


def build_tree_layout(rollouts: Rollouts, order: PrefixOrder) -> TreeLayout:
    """Lay out the rollouts that `order` names: all of the batch, or a part of it.

    Everything follows from how much each rollout shares with the one before it. Rollout i adds its tokens from depth
    shared[i] on. The tokens right above them belong to its parent, the nearest rollout before it that shares less,
    and so on up to a rollout that shares nothing. The loops below walk up from all rollouts at once.

    Args:
        rollouts: the batch.
        order: from `prefix_order`, or a part of it.

    Returns:
        The layout. Its `token_positions` cover the rollouts of `order.index` in ascending order of their batch index.
    """
    lengths = rollouts.lengths[order.index]
    added = lengths - order.shared
    starts = offsets_from_lengths(added)
    parent = _nearest_smaller(order.shared)
    owner, begin, size = _paths(order.shared, lengths, starts, parent)
    batch_rank = np.argsort(np.argsort(order.index))
    in_batch_order = batch_rank[owner].argsort(kind="stable")
    adding = np.flatnonzero(added)
    path_spans, path_offsets = _merge_adjacent(owner, begin, size, adding)
    tokens = repeat_by_length(rollouts.offsets[order.index] + order.shared, added)
    return TreeLayout(
        input_ids=rollouts.input_ids[tokens].astype(np.int64),
        depth=repeat_by_length(order.shared, added),
        end=_subtree_ends(order.shared, lengths, starts, parent),
        token_positions=repeat_by_length(begin[in_batch_order], size[in_batch_order]),
        segment_starts=np.append(starts[adding], starts[-1]),
        path_spans=path_spans,
        path_offsets=path_offsets,
    )


def _nearest_smaller(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [n]: the index of the nearest smaller number before each; -1 where there is none."""
    nearest: list[int] = []
    stack: list[int] = []  # indices of ascending numbers: those that may still be the nearest smaller one
    values = numbers.tolist()
    for i, value in enumerate(values):
        while stack and values[stack[-1]] >= value:
            stack.pop()
        nearest.append(stack[-1] if stack else -1)
        stack.append(i)
    return np.asarray(nearest, dtype=np.int64)


def _paths(
    shared: NDArray[np.int64], lengths: NDArray[np.int64], starts: NDArray[np.int64], parent: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Every span of every path, paths in order, root first: (its rollout's index, first position, positions)."""
    owner = node = np.arange(len(shared))
    high = lengths
    levels = []
    while len(node):
        # The path of `owner` goes through what `node` adds at depths low to high - 1.
        low = shared[node]
        levels.append((owner, starts[node], high - low))
        up = low > 0
        owner, high, node = owner[up], low[up], parent[node[up]]
    owner, begin, size = (np.concatenate(parts) for parts in zip(*reversed(levels), strict=True))
    order = owner.argsort(kind="stable")  # stable: the levels of one path stay root first
    return owner[order], begin[order], size[order]


def _subtree_ends(
    shared: NDArray[np.int64], lengths: NDArray[np.int64], starts: NDArray[np.int64], parent: NDArray[np.int64]
) -> NDArray[np.int64]:
    """int64 [S]: where the subtree below each position ends.

    What rollout i+1 does not share with the path of rollout i, at depths of shared[i+1] and more, ends where rollout
    i+1 begins to add positions.
    """
    node = np.arange(len(shared))
    high, floor, end_here = lengths, np.append(shared[1:], 0), starts[1:]
    levels = []
    while len(node):
        low = np.maximum(shared[node], floor)
        levels.append((starts[node] + low - shared[node], high - low, end_here))
        up = shared[node] > floor
        high, floor, end_here, node = shared[node[up]], floor[up], end_here[up], parent[node[up]]
    begin, size, end = (np.concatenate(parts) for parts in zip(*levels, strict=True))
    # Together the spans cover 0 to S without gaps or overlap; empty ones among them repeat nothing.
    order = begin.argsort(kind="stable")
    return np.repeat(end[order], size[order])


def _merge_adjacent(
    owner: NDArray[np.int64], begin: NDArray[np.int64], size: NDArray[np.int64], adding: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The paths of the rollouts `adding`, adjacent spans merged: (path_spans [p, 2], path_offsets [m+1])."""
    chosen = np.isin(owner, adding)
    owner, begin, stop = owner[chosen], begin[chosen], (begin + size)[chosen]
    first = np.append(True, (owner[1:] != owner[:-1]) | (begin[1:] != stop[:-1]))
    last = np.append(first[1:], True)
    counts = np.bincount(owner[first], minlength=len(adding))[adding]
    return np.stack([begin[first], stop[last]], axis=1), offsets_from_lengths(counts)


def with_padding(layout: TreeLayout, multiple: int) -> TreeLayout:
    """The layout and as many positions after it as make their number a multiple of `multiple`: a tree of their own.

    No token stands at them, and no other position attends to them.
    """
    size, missing = len(layout), -len(layout) % multiple
    if not missing:
        return layout
    total = size + missing
    return replace(
        layout,
        input_ids=np.append(layout.input_ids, np.repeat(layout.input_ids[:1], missing)),
        depth=np.append(layout.depth, np.arange(missing)),
        end=np.append(layout.end, np.full(missing, total)),
        segment_starts=np.append(layout.segment_starts, total),
        path_spans=np.concatenate([layout.path_spans, [[size, total]]]),
        path_offsets=np.append(layout.path_offsets, layout.path_offsets[-1] + 1),
    )


def attention_mask(layout: TreeLayout) -> NDArray[np.bool_]:
    """bool [S, S]: whether position q (row) may attend to position k (column). For small layouts and tests."""
    q = np.arange(len(layout))[:, None]
    k = np.arange(len(layout))[None, :]
    return (k <= q) & (q < layout.end[None, :])
