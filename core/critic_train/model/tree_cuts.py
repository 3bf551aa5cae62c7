"""Where a prefix tree that is larger than a micro-batch is cut: between rollouts, where the least is computed twice.

A tree's rollouts stand in depth-first order, and a piece is a run of them. The first rollout of a piece is computed
from its root on, so a cut before it computes again what it shares with the rollout before. Rollouts of an agent that
branch at every turn share much or little with their neighbours: cuts belong where they share little.
"""

from collections import deque
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from critic_train.rollouts import offsets_from_lengths

Run = tuple[int, int]
"""Positions start:stop of an order; the rollouts there are computed together as one tree."""


def tree_pieces(
    lengths: NDArray[np.int64], shared: NDArray[np.int64], max_tokens: int, *, as_they_come: bool = False
) -> list[Run]:
    """Cut an order of rollouts into its prefix trees, and those that are too large into pieces.

    Args:
        lengths: int64 [n], tokens of the rollout at each position of the order.
        shared: int64 [n], how many of them it has in common with the rollout before it; 0 begins a tree.
        max_tokens: positions that a piece may hold; a single longer rollout is a piece.
        as_they_come: cut where the next rollout no longer fits, the rule of older runs.

    Returns:
        Together they hold every position once, in order.
    """
    starts = [*np.flatnonzero(shared == 0).tolist(), len(shared)] if len(shared) else []
    # A run start:stop holds shared[start] + before[stop] - before[start] positions.
    before: list[int] = offsets_from_lengths(lengths - shared).tolist()
    own: list[int] = shared.tolist()
    pieces: list[Run] = []
    for start, stop in pairwise(starts):
        if before[stop] - before[start] <= max_tokens:
            pieces.append((start, stop))
        elif as_they_come:
            pieces += _as_they_come(start, stop, own, before, max_tokens)
        else:
            pieces += _least_twice(start, stop, own, before, max_tokens)
    return pieces


def _as_they_come(start: int, stop: int, shared: list[int], before: list[int], max_tokens: int) -> list[Run]:
    pieces = []
    for position in range(start + 1, stop):
        if shared[start] + before[position + 1] - before[start] > max_tokens:
            pieces.append((start, position))
            start = position
    return [*pieces, (start, stop)]


def _least_twice(start: int, stop: int, shared: list[int], before: list[int], max_tokens: int) -> list[Run]:
    """The pieces of one tree with the smallest sum of what is shared at the cuts; of equal ones, the fewest.

    best[p] is (that sum, pieces) for the rollouts start:p. A piece that ends at p may begin anywhere between the first
    start at which it fits, which never moves back, and p - 1: the best of them is the minimum of a sliding window.
    """
    best = {start: (0, 0)}
    begins: dict[int, int] = {}
    window: deque[tuple[tuple[int, int], int]] = deque()  # ((sum with the cut at p, pieces so far), p), ascending
    first = start
    for end in range(start + 1, stop + 1):
        begin = end - 1
        cost = (best[begin][0] + shared[begin], best[begin][1])
        while window and window[-1][0] > cost:
            window.pop()
        window.append((cost, begin))
        while first < begin and shared[first] + before[end] - before[first] > max_tokens:
            first += 1
        while window[0][1] < first:
            window.popleft()
        (repeated, pieces), begins[end] = window[0]
        best[end] = (repeated, pieces + 1)
    cuts = [stop]
    while cuts[-1] > start:
        cuts.append(begins[cuts[-1]])
    cuts.reverse()
    return list(pairwise(cuts))
