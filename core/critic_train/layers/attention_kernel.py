"""The interface of an attention kernel: the queries of a layout that it is built for, and how it is called.

The implementations are in `sdpa_kernels` and `cuda_kernels`; the table of them, from which `--attention` chooses, is
`attention.KERNELS`. Shapes: S positions of the layout, Q <= S of them that are queries.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from critic_train.layers.prefix_tree import Span, TreeLayout
from critic_train.rollouts import repeat_by_length

SHORT_GAP = 64
"""Gaps of fewer positions between queries are filled: a call of attention costs more than so few queries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuerySpan:
    """Adjacent queries of one rollout.

    Attributes:
        queries: their indices among the Q queries.
        own: their positions in the layout.
        path: the keys of the last of them: the positions from the root to it, as spans.
    """

    queries: Span
    own: Span
    path: tuple[Span, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Queries:
    """The positions of a layout whose attention is computed.

    Attributes:
        layout: the layout.
        positions: int64 [Q], ascending; None where all S are queries.
        spans: the queries as adjacent ones of one rollout, left to right, as few spans as possible.
    """

    layout: TreeLayout
    positions: NDArray[np.int64] | None
    spans: tuple[QuerySpan, ...]


class Kernel(Protocol):
    """Attention of the queries of a layout to their ancestors and themselves.

    A kernel is built for some `Queries` on a device, once for all layers of the trunk, and called by each layer. It is
    differentiable in query, key and value.
    """

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None) -> Tensor:
        """Compute attention.

        Args:
            query: [1, heads, Q, head_dim].
            key: [1, kv_heads, S, head_dim]; heads is a multiple of kv_heads.
            value: [1, kv_heads, S, head_dim].
            window: a query attends to at most so many tokens of its rollout, itself included; None means to all.
            scale: factor on the scores; None means 1/sqrt(head_dim).

        Returns:
            [1, Q, heads, head_dim].
        """


def all_queries(layout: TreeLayout) -> Queries:
    """Every position of a layout is a query."""
    spans = tuple(QuerySpan(queries=s.own, own=s.own, path=s.path) for s in layout.segments)
    return Queries(layout=layout, positions=None, spans=spans)


def queries_at(layout: TreeLayout, positions: NDArray[np.int64]) -> Queries:
    """Only some positions of a layout are queries.

    Args:
        layout: the layout.
        positions: int64 [Q], ascending.
    """
    segments = layout.segments
    first, stop, segment = _spans(layout, positions)
    ends = np.cumsum(stop - first).tolist()
    spans = []
    for begin, end, number, last in zip(first.tolist(), stop.tolist(), segment.tolist(), ends, strict=True):
        # Positions ascend along a path: the keys of the last query are those of its rollout up to itself.
        path = tuple((a, min(b, end)) for a, b in segments[number].path if a < end)
        spans.append(QuerySpan(queries=(last - (end - begin), last), own=(begin, end), path=path))
    return Queries(layout=layout, positions=positions, spans=tuple(spans))


def fill_short_gaps(layout: TreeLayout, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Add to some positions those of the gaps before them in their rollout that are shorter than SHORT_GAP.

    Args:
        layout: the layout.
        positions: int64, ascending.

    Returns:
        int64, ascending.
    """
    first, stop, segment = _spans(layout, positions)
    previous = np.maximum(np.append(0, stop[:-1]), layout.segment_starts[segment])
    first = np.where(first - previous < SHORT_GAP, previous, first)
    return repeat_by_length(first, stop - first)


def _spans(
    layout: TreeLayout, positions: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(first, last + 1, segment) of every span of adjacent positions of one rollout, left to right."""
    if not len(positions):
        return positions, positions, positions
    # A span ends where a position is left out, and where a segment begins.
    gaps = np.flatnonzero(np.diff(positions) != 1) + 1
    borders = np.searchsorted(positions, layout.segment_starts[1:-1])
    bounds = np.unique(np.concatenate([[0], gaps, borders, [len(positions)]]))
    first, stop = positions[bounds[:-1]], positions[bounds[1:] - 1] + 1
    return first, stop, np.searchsorted(layout.segment_starts, first, side="right") - 1
