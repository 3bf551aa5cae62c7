"""Which positions ask, and what each sees: the geometry that every kernel starts from."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from critic_train.model.prefix_tree import Span, TreeLayout
from critic_train.rollouts import repeat_by_length

Kernel = Callable[[Tensor, Tensor, Tensor, int | None, float | None], Tensor]
"""(query [1, heads, Q, head_dim], key, value [1, kv_heads, S, head_dim], window, scale) -> [1, Q, heads, head_dim].

A query sees its ancestors and itself, at most `window` tokens of its rollout; `scale` None is 1/sqrt(head_dim)."""

SHORT_GAP = 64
"""Fewer positions than this that nobody reads, before one that is read, are computed all the same: a piece of attention
costs more than so few queries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuerySpan:
    """Neighbouring positions of one rollout that ask.

    Attributes:
        queries: where they stand among all that ask.
        own: where they stand in the layout.
        path: the runs of positions from the root to the last of them.
    """

    queries: Span
    own: Span
    path: tuple[Span, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Queries:
    """The positions of a layout that ask.

    Attributes:
        layout: the layout.
        positions: int64 [Q], ascending; None where all S ask.
        runs: as few as possible, left to right.
    """

    layout: TreeLayout
    positions: NDArray[np.int64] | None
    spans: tuple[QuerySpan, ...]


def all_queries(layout: TreeLayout) -> Queries:
    """Every position asks."""
    runs = tuple(QuerySpan(queries=s.own, own=s.own, path=s.path) for s in layout.segments)
    return Queries(layout=layout, positions=None, spans=runs)


def queries_at(layout: TreeLayout, positions: NDArray[np.int64]) -> Queries:
    """Only some positions ask.

    Args:
        layout: the layout.
        positions: int64 [Q], ascending.
    """
    segments = layout.segments
    first, last, segment = _runs(layout, positions)
    ends = np.cumsum(last - first).tolist()
    runs = []
    for start, stop, number, end in zip(first.tolist(), last.tolist(), segment.tolist(), ends, strict=True):
        # What stands after the run in its rollout is not on its path; positions ascend along a path.
        path = tuple((a, min(b, stop)) for a, b in segments[number].path if a < stop)
        runs.append(QuerySpan(queries=(end - (stop - start), end), own=(start, stop), path=path))
    return Queries(layout=layout, positions=positions, spans=tuple(runs))


def fill_short_gaps(layout: TreeLayout, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64, ascending: `positions`, and those in gaps shorter than SHORT_GAP before them in their rollout."""
    first, last, segment = _runs(layout, positions)
    before = np.maximum(np.append(0, last[:-1]), layout.segment_starts[segment])
    first = np.where(first - before < SHORT_GAP, before, first)
    return repeat_by_length(first, last - first)


def _runs(
    layout: TreeLayout, positions: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(first, last + 1, segment) of every run of neighbouring positions of one rollout, left to right."""
    if not len(positions):
        return positions, positions, positions
    inside = np.searchsorted(positions, layout.segment_starts[1:-1])
    bounds = np.unique(np.concatenate([[0], np.flatnonzero(np.diff(positions) != 1) + 1, inside, [len(positions)]]))
    first, last = positions[bounds[:-1]], positions[bounds[1:] - 1] + 1
    return first, last, np.searchsorted(layout.segment_starts, first, side="right") - 1
