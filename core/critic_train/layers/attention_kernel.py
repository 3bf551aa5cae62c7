"""The interface of an attention kernel: the queries of a layout that it is built for, and how it is called.

The implementations are in `sdpa_kernels` and `cuda_kernels`; the table of them, from which `--attention` chooses, is
`attention.KERNELS`. Shapes: S positions of the layout, Q <= S of them that are queries.
"""

from collections.abc import Sequence
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What a layer asks of attention beside its causal mask.

    Attributes:
        scale: factor on the scores; None means 1/sqrt(head_dim).
        window: a query attends to at most so many tokens of its rollout, itself included; None means to all.
        chunk: a rollout is cut into chunks of so many tokens, and a query attends within its own (Llama-4).
        softcap: scores s become softcap * tanh(s / softcap) (Gemma-2).
        sinks: float [heads]: the score of one more key of each head, whose value is 0 (GPT-OSS).
    """

    scale: float | None = None
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


PLAIN = Scoring()


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """What a layer calls attention with, without the numbers.

    Attributes:
        heads: of the queries.
        kv_heads: of keys and values.
        key_size: of each query's and key's head.
        value_size: of each value's head.
        scoring: without sinks.
        has_sinks: whether there are sinks.
    """

    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    scoring: Scoring = PLAIN
    has_sinks: bool = False


class KernelLacksError(Exception):
    """A kernel does not compute what a layer asks for."""


class Kernel(Protocol):
    """Attention of the queries of a layout to their ancestors and themselves.

    A kernel is built for some `Queries` on a device, once for all layers of the trunk, and called by each layer. It is
    differentiable in query, key and value.
    """

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Compute attention.

        Args:
            query: [1, heads, Q, head_dim].
            key: [1, kv_heads, S, head_dim]; heads is a multiple of kv_heads.
            value: [1, kv_heads, S, head_dim].
            scoring: of the layer.

        Returns:
            [1, Q, heads, head_dim].

        Raises:
            KernelLacksError: the kernel does not compute this.
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


def within_reach(
    queries: Queries, *, window: int | None = None, chunk: int | None = None, block: int | None = None
) -> tuple[QuerySpan, ...]:
    """The spans of queries, each path cut down to the keys that one of its queries attends to.

    Spans are cut where a chunk ends: in one chunk, attention is plain and causal on what is left of the path.

    Args:
        queries: of a layout.
        window: see `Scoring`.
        chunk: see `Scoring`.
        block: cut spans into at most so many queries, so that little of a path is left to each; None for whole spans.
    """
    spans: list[QuerySpan] = []
    for span in queries.spans:
        depth = int(queries.layout.depth[span.own[0]])  # the index on the path, too, for a path begins at the root
        size = span.own[1] - span.own[0]
        for start, stop in _pieces(depth, depth + size, chunk, block):
            lowest = max(0, 0 if window is None else start - window + 1, 0 if chunk is None else start // chunk * chunk)
            first, last = start - depth, stop - depth
            spans.append(
                QuerySpan(
                    queries=(span.queries[0] + first, span.queries[0] + last),
                    own=(span.own[0] + first, span.own[0] + last),
                    path=_cut(span.path, lowest, stop),
                )
            )
    return tuple(spans)


def _pieces(start: int, stop: int, chunk: int | None, block: int | None) -> list[Span]:
    """Depths start to stop - 1, cut where a chunk begins and into at most `block` each."""
    pieces = []
    while start < stop:
        ends = [
            stop,
            *([] if chunk is None else [(start // chunk + 1) * chunk]),
            *([] if block is None else [start + block]),
        ]
        pieces.append((start, min(ends)))
        start = min(ends)
    return pieces


def _cut(path: Sequence[Span], low: int, high: int) -> tuple[Span, ...]:
    """The spans of a path that hold its positions low to high - 1, counted along the path."""
    spans, index = [], 0
    for start, stop in path:
        first, last = max(start, start + low - index), min(stop, start + high - index)
        if first < last:
            spans.append((first, last))
        index += stop - start
    return tuple(spans)
