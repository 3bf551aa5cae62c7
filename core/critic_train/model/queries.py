"""Which positions ask, and what each sees: the geometry that every kernel starts from."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from critic_train.model.prefix_tree import PrefixTrees, Run
from critic_train.rollouts import repeat_by_length

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

    forest: PrefixTrees
    positions: NDArray[np.int64] | None
    runs: tuple[QueryRun, ...]


def all_queries(forest: PrefixTrees) -> Queries:
    """Every position asks."""
    runs = tuple(QueryRun(queries=s.own, own=s.own, path=s.path) for s in forest.segments)
    return Queries(forest=forest, positions=None, runs=runs)


def queries_at(forest: PrefixTrees, positions: NDArray[np.int64]) -> Queries:
    """Only some positions ask.

    Args:
        forest: the layout.
        positions: int64 [Q], ascending.
    """
    segments = forest.segments
    first, last, segment = _runs(forest, positions)
    ends = np.cumsum(last - first).tolist()
    runs = []
    for start, stop, number, end in zip(first.tolist(), last.tolist(), segment.tolist(), ends, strict=True):
        # What stands after the run in its rollout is not on its path; positions ascend along a path.
        path = tuple((a, min(b, stop)) for a, b in segments[number].path if a < stop)
        runs.append(QueryRun(queries=(end - (stop - start), end), own=(start, stop), path=path))
    return Queries(forest=forest, positions=positions, runs=tuple(runs))


def without_short_gaps(forest: PrefixTrees, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64, ascending: `positions`, and those in gaps shorter than SHORT_GAP before them in their rollout."""
    first, last, segment = _runs(forest, positions)
    before = np.maximum(np.append(0, last[:-1]), forest.starts[segment])
    first = np.where(first - before < SHORT_GAP, before, first)
    return repeat_by_length(first, last - first)


def _runs(
    forest: PrefixTrees, positions: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(first, last + 1, segment) of every run of neighbouring positions of one rollout, left to right."""
    if not len(positions):
        return positions, positions, positions
    inside = np.searchsorted(positions, forest.starts[1:-1])
    bounds = np.unique(np.concatenate([[0], np.flatnonzero(np.diff(positions) != 1) + 1, inside, [len(positions)]]))
    first, last = positions[bounds[:-1]], positions[bounds[1:] - 1] + 1
    return first, last, np.searchsorted(forest.starts, first, side="right") - 1
