"""Lay rollouts out as prefix trees, so that a prefix shared by several rollouts is computed once.

The layout is the depth-first order of the trie of the rollouts. Three arrays describe it:

    input_ids[k]   the token at position k
    depth[k]       its place in its rollout, which is its position id
    end[k]         the exclusive end of the subtree below it: position q may attend to k iff k <= q < end[k]

Sorting the rollouts lexicographically makes neighbours share as much as any two rollouts do, so the trie follows
from the common prefixes of neighbours alone. `end` is FlashMask's column-wise row bound (arXiv 2410.01359).
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from critic_train.rollouts import Rollouts, offsets_from_lengths, repeat_by_length

Span = tuple[int, int]
"""A stretch start:stop of layout positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixOrder:
    """Rollouts in the order of a depth-first walk, and how much each shares with the one before it.

    Attributes:
        index: int64 [n], positions of the rollouts in their batch, lexicographically sorted by tokens.
        shared: int64 [n], tokens that rollout index[i] has in common with rollout index[i-1]; 0 for the first.
    """

    index: NDArray[np.int64]
    shared: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def part(self, places: NDArray[np.int64]) -> "PrefixOrder":
        """The rollouts at some places, ascending, and what each shares with the one that is now before it."""
        if not len(places):
            return PrefixOrder(index=self.index[:0], shared=self.shared[:0])
        # Two rollouts have in common what all that stand between them have.
        least = np.minimum.reduceat(self.shared[: places[-1] + 1], np.append(0, places[:-1] + 1))
        return PrefixOrder(index=self.index[places], shared=np.append(0, least[1:]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The tokens that one rollout adds to the layout, and the path of ancestors they hang on.

    Attributes:
        own: the positions the rollout adds.
        path: the runs of positions from the root to the rollout's last token; `own` is their tail.
    """

    own: Span
    path: tuple[Span, ...]

    @property
    def own_length(self) -> int:
        """Tokens the rollout adds."""
        return self.own[1] - self.own[0]

    @property
    def path_length(self) -> int:
        """Tokens from the root to the rollout's last token."""
        return sum(stop - start for start, stop in self.path)


@dataclass(frozen=True, kw_only=True)
class TreeLayout:
    """The layout of n rollouts with T tokens in all on S <= T positions.

    Attributes:
        input_ids: int64 [S], the token at each position.
        depth: int64 [S], position ids.
        end: int64 [S], exclusive end of the subtree below each position.
        where: int64 [T], the position of every token of every rollout, rollouts in their batch's order.
        starts: int64 [m+1], of the m rollouts that add tokens, left to right: the first position each adds, and S.
        runs: int64 [r, 2], (start, stop) of the stretches of positions that the paths of those m rollouts are made
            of, root first.
        run_offsets: int64 [m+1]; the path of rollout s is runs[run_offsets[s]:run_offsets[s+1]].
    """

    input_ids: NDArray[np.int64]
    depth: NDArray[np.int64]
    end: NDArray[np.int64]
    token_positions: NDArray[np.int64]
    segment_starts: NDArray[np.int64]
    runs: NDArray[np.int64]
    run_offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """One for each rollout that adds tokens, left to right."""
        runs: list[Span] = list(map(tuple, self.runs.tolist()))
        paths = [tuple(runs[first:last]) for first, last in pairwise(self.run_offsets.tolist())]
        return tuple(
            Segment(own=own, path=path) for own, path in zip(pairwise(self.segment_starts.tolist()), paths, strict=True)
        )


def prefix_order(rollouts: Rollouts) -> PrefixOrder:
    """Sort rollouts so that those with a common prefix stand together.

    Big-endian bytes compare as the token ids do, so one memcmp orders two rollouts. Sharing is found from the
    tokens alone, in prompts and responses alike.
    """
    offsets = rollouts.offsets.tolist()
    keys = rollouts.input_ids.astype(">u4").tobytes()
    rows = [keys[4 * start : 4 * stop] for start, stop in pairwise(offsets)]
    index = sorted(range(len(rows)), key=rows.__getitem__)
    shared = np.zeros(len(index), dtype=np.int64)
    ids = rollouts.input_ids
    for place in range(1, len(index)):
        one, other = index[place - 1], index[place]
        width = min(offsets[one + 1] - offsets[one], offsets[other + 1] - offsets[other])
        differs = ids[offsets[one] : offsets[one] + width] != ids[offsets[other] : offsets[other] + width]
        first = int(differs.argmax()) if width else 0
        shared[place] = first if width and differs[first] else width
    return PrefixOrder(index=np.asarray(index, dtype=np.int64), shared=shared)


def build_tree_layout(rollouts: Rollouts, order: PrefixOrder) -> TreeLayout:
    """Lay out the rollouts named by `order` (all of the batch's or a part of them).

    Everything follows from how much each rollout shares with the one before it. Rollout i adds its tokens from depth
    shared[i] on; what stands above them belongs to the nearest rollout before it that shares less, and so on up to
    one that shares nothing. The loops below go up that chain for all rollouts at once.

    Args:
        rollouts: the batch.
        order: from `prefix_order`, or a part of it whose first `shared` is 0.

    Returns:
        The layout. `where` covers the rollouts of `order.index` in ascending order of their batch position.
    """
    lengths = rollouts.lengths[order.index]
    own = lengths - order.shared
    starts = offsets_from_lengths(own)
    parent = _nearest_smaller(order.shared)
    owner, begin, size = _paths(order.shared, lengths, starts, parent)
    in_batch = np.argsort(np.argsort(order.index))[owner].argsort(kind="stable")
    adding = np.flatnonzero(own)
    runs, run_offsets = _joined(owner, begin, size, adding)
    return TreeLayout(
        input_ids=rollouts.input_ids[repeat_by_length(rollouts.offsets[order.index] + order.shared, own)].astype(
            np.int64
        ),
        depth=repeat_by_length(order.shared, own),
        end=_ends(order.shared, lengths, starts, parent),
        token_positions=repeat_by_length(begin[in_batch], size[in_batch]),
        segment_starts=np.append(starts[adding], starts[-1]),
        runs=runs,
        run_offsets=run_offsets,
    )


def _nearest_smaller(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [n]: the nearest place before each that holds a smaller number; -1 where none does."""
    found: list[int] = []
    open_places: list[int] = []
    values = numbers.tolist()
    for place, value in enumerate(values):
        while open_places and values[open_places[-1]] >= value:
            open_places.pop()
        found.append(open_places[-1] if open_places else -1)
        open_places.append(place)
    return np.asarray(found, dtype=np.int64)


def _paths(
    shared: NDArray[np.int64], lengths: NDArray[np.int64], starts: NDArray[np.int64], parent: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(place in the order, first position, positions) of every run of every path: paths in order, root first."""
    place = node = np.arange(len(shared))
    high = lengths
    levels = []
    while len(node):
        low = shared[node]
        levels.append((place, starts[node], high - low))
        up = low > 0
        place, high, node = place[up], low[up], parent[node[up]]
    owner, begin, size = (np.concatenate(parts) for parts in zip(*reversed(levels), strict=True))
    order = owner.argsort(kind="stable")
    return owner[order], begin[order], size[order]


def _ends(
    shared: NDArray[np.int64], lengths: NDArray[np.int64], starts: NDArray[np.int64], parent: NDArray[np.int64]
) -> NDArray[np.int64]:
    """int64 [S]: where the subtree below each position ends.

    What a rollout does not share with the path before it ends where its own tokens begin.
    """
    node = np.arange(len(shared))
    high, floor, closing = lengths, np.append(shared[1:], 0), starts[1:]
    levels = []
    while len(node):
        low = np.maximum(shared[node], floor)
        levels.append((starts[node] + low - shared[node], high - low, closing))
        up = shared[node] > floor
        high, floor, closing, node = shared[node[up]], floor[up], closing[up], parent[node[up]]
    begin, size, end = (np.concatenate(parts) for parts in zip(*levels, strict=True))
    # Runs without positions do not matter; the others lie side by side from 0 to S.
    order = begin.argsort(kind="stable")
    return np.repeat(end[order], size[order])


def _joined(
    owner: NDArray[np.int64], begin: NDArray[np.int64], size: NDArray[np.int64], adding: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Runs of the paths of the rollouts `adding`, those that touch made one: (int64 [r, 2], int64 [m+1])."""
    kept = np.isin(owner, adding)
    owner, begin, stop = owner[kept], begin[kept], (begin + size)[kept]
    new = np.append(True, (owner[1:] != owner[:-1]) | (begin[1:] != stop[:-1]))
    last = np.append(new[1:], True)
    counts = np.bincount(owner[new], minlength=len(adding))[adding]
    return np.stack([begin[new], stop[last]], axis=1), offsets_from_lengths(counts)


def attention_mask(layout: TreeLayout) -> NDArray[np.bool_]:
    """bool [S, S]: whether position q (row) may attend to position k (column). For small forests and tests."""
    q = np.arange(len(layout))[:, None]
    k = np.arange(len(layout))[None, :]
    return (k <= q) & (q < layout.end[None, :])
