"""Lay rollouts out as prefix trees, so that a prefix shared by several rollouts is computed once.

The layout is the depth-first order of the trie of the rollouts. Three arrays describe it:

    input_ids[k]   the token at position k
    depth[k]       its place in its rollout, which is its position id
    end[k]         the exclusive end of the subtree below it: position q may attend to k iff k <= q < end[k]

Sorting the rollouts lexicographically makes neighbours share as much as any two rollouts do, so the trie follows
from the common prefixes of neighbours alone. `end` is FlashMask's column-wise row bound (arXiv 2410.01359).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from critic_train.rollouts import Rollouts

Run = tuple[int, int]
"""A stretch start:stop of forest positions."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The tokens that one rollout adds to the forest, and the path of ancestors they hang on.

    Attributes:
        own: the positions the rollout adds.
        path: the runs of positions from the root to the rollout's last token; `own` is their tail.
    """

    own: Run
    path: tuple[Run, ...]

    @property
    def own_length(self) -> int:
        """Tokens the rollout adds."""
        return self.own[1] - self.own[0]

    @property
    def path_length(self) -> int:
        """Tokens from the root to the rollout's last token."""
        return sum(stop - start for start, stop in self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forest:
    """The layout of n rollouts with T tokens in all on S <= T positions.

    Attributes:
        input_ids: int64 [S], the token at each position.
        depth: int64 [S], position ids.
        end: int64 [S], exclusive end of the subtree below each position.
        where: int64 [T], the position of every token of every rollout, rollouts in their batch's order.
        segments: one per rollout that adds tokens, left to right.
    """

    input_ids: NDArray[np.int64]
    depth: NDArray[np.int64]
    end: NDArray[np.int64]
    where: NDArray[np.int64]
    segments: tuple[Segment, ...]

    def __len__(self) -> int:
        return len(self.input_ids)


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


def lay_out(rollouts: Rollouts, order: PrefixOrder) -> Forest:
    """Lay out the rollouts named by `order` (all of the batch's or a part of them).

    Args:
        rollouts: the batch.
        order: from `prefix_order`, or a part of it whose first `shared` is 0.

    Returns:
        The forest. `where` covers the rollouts of `order.index` in ascending order of their batch position.
    """
    pieces: list[NDArray[np.int32]] = []
    where: dict[int, NDArray[np.int64]] = {}
    segments: list[Segment] = []
    starts: list[int] = []
    depths: list[int] = []
    path: list[Run] = []
    positions = np.empty(0, dtype=np.int64)
    size = 0
    closings: list[tuple[NDArray[np.int64], int]] = []
    for i, shared in zip(order.index.tolist(), order.shared.tolist(), strict=True):
        ids = rollouts.input_ids[rollouts.offsets[i] : rollouts.offsets[i + 1]]
        # The subtrees of everything below the branching point end where this rollout's own tokens begin.
        closings.append((positions[shared:], size))
        own = len(ids) - shared
        path = _cut(path, shared)
        if own:
            pieces.append(ids[shared:])
            starts.append(size)
            depths.append(shared)
            path = _join(path, (size, size + own))
            segments.append(Segment(own=(size, size + own), path=tuple(path)))
            positions = np.concatenate([positions[:shared], np.arange(size, size + own)])
            size += own
        else:
            positions = positions[:shared]
        where[i] = positions
    closings.append((positions, size))
    end = np.empty(size, dtype=np.int64)
    for closed, at in closings:
        end[closed] = at
    own_lengths = np.diff(np.asarray([*starts, size]))
    depth = np.arange(size) - np.repeat(np.asarray(starts) - np.asarray(depths), own_lengths)
    return Forest(
        input_ids=np.concatenate(pieces).astype(np.int64),
        depth=depth,
        end=end,
        where=np.concatenate([where[i] for i in sorted(where)]),
        segments=tuple(segments),
    )


def _cut(path: Sequence[Run], length: int) -> list[Run]:
    """The first `length` positions of a path."""
    kept: list[Run] = []
    for start, stop in path:
        if length <= 0:
            break
        kept.append((start, min(stop, start + length)))
        length -= stop - start
    return kept


def _join(path: list[Run], run: Run) -> list[Run]:
    """A path with a run added, merged with the last one where they touch."""
    if path and path[-1][1] == run[0]:
        return [*path[:-1], (path[-1][0], run[1])]
    return [*path, run]


def attention_mask(forest: Forest) -> NDArray[np.bool_]:
    """bool [S, S]: whether position q (row) may attend to position k (column). For small forests and tests."""
    q = np.arange(len(forest))[:, None]
    k = np.arange(len(forest))[None, :]
    return (k <= q) & (q < forest.end[None, :])
