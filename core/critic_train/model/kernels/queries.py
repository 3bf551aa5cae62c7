"""Which positions ask, and what each sees: the geometry that every kernel starts from."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from critic_train.model.forest import Forest, Run
from critic_train.rollouts import spread

Kernel = Callable[[Tensor, Tensor, Tensor, int | None, float | None], Tensor]
"""(query [1, heads, Q, head_dim], key, value [1, kv_heads, S, head_dim], window, scale) -> [1, Q, heads, head_dim].

A query sees its ancestors and itself, at most `window` tokens of its rollout; `scale` None is 1/sqrt(head_dim)."""

SHORT_GAP = 64
"""Fewer positions than this that nobody reads, before one that is read, are computed all the same: a piece of attention
costs more than so few queries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryRun:
    """Neighbouring positions of one rollout that ask.

    Attributes:
        queries: where they stand among all that ask.
        own: where they stand in the forest.
        path: the runs of positions from the root to the last of them.
    """

    queries: Run
    own: Run
    path: tuple[Run, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Queries:
    """The positions of a forest that ask.

    Attributes:
        forest: the layout.
        positions: int64 [Q], ascending; None where all S ask.
        runs: as few as possible, left to right.
    """

    forest: Forest
    positions: NDArray[np.int64] | None
    runs: tuple[QueryRun, ...]


def all_queries(forest: Forest) -> Queries:
    """Every position asks."""
    runs = tuple(QueryRun(queries=s.own, own=s.own, path=s.path) for s in forest.segments)
    return Queries(forest=forest, positions=None, runs=runs)


def queries_at(forest: Forest, positions: NDArray[np.int64]) -> Queries:
    """Only some positions ask.

    Args:
        forest: the layout.
        positions: int64 [Q], ascending.
    """
    segment = np.searchsorted(forest.starts, positions, side="right") - 1
    breaks = np.flatnonzero((np.diff(positions) != 1) | (np.diff(segment) != 0)) + 1
    bounds = [0, *breaks.tolist(), len(positions)]
    segments = forest.segments
    runs = []
    for first, last in pairwise(bounds):
        own = int(positions[first]), int(positions[last - 1]) + 1
        path = segments[segment[first]].path
        # What stands after the run in its rollout is not on its path; positions ascend along a path.
        cut = tuple((start, min(stop, own[1])) for start, stop in path if start < own[1])
        runs.append(QueryRun(queries=(first, last), own=own, path=cut))
    return Queries(forest=forest, positions=positions, runs=tuple(runs))


def without_short_gaps(forest: Forest, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64, ascending: `positions`, and those in gaps shorter than SHORT_GAP before them in their rollout."""
    segment = np.searchsorted(forest.starts, positions, side="right") - 1
    before = np.maximum(np.append(-1, positions[:-1]), forest.starts[segment] - 1)
    gap = positions - before - 1
    filled = np.flatnonzero((gap > 0) & (gap < SHORT_GAP))
    return np.sort(np.concatenate([positions, spread(before[filled] + 1, gap[filled])]))
