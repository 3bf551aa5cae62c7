"""Attention rollout by rollout through torch's scaled-dot-product attention: on any device, windows and all.

The queries are neighbouring positions of one rollout, the keys are their path from the root. The last query sees the
whole path, so the causal mask is aligned at the lower right.

Attention piece by piece on the CPU: exactly the pairs that are seen, no masks, no copies of keys.

Every run of queries attends to itself causally; every stretch of positions that other rollouts hang on is attended to
in one block by all queries below it, which stand side by side in the layout. A query's pieces are merged by their
log-sum-exp, and the backward pass runs piece by piece with the merged output and log-sum-exp, as ring attention does
(Liu et al. 2023). torch's own backward of an attention that returns its log-sum-exp ignores the latter's gradient,
hence a Function of our own.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from critic_train.model.prefix_tree import Span
from critic_train.model.queries import Queries


class SdpaKernel:
    """A kernel (see `queries.Kernel`).

    Keys and values are split into pieces at every point where a path is cut; a run's keys are the pieces of its path,
    concatenated. Splitting once and concatenating keeps the backward pass free of scatter-adds into the full tensor.

    Args:
        queries: who asks.
        device: where the masks are made.
    """

    def __init__(self, queries: Queries, device: torch.device) -> None:
        cuts = {0, len(queries.layout)}
        for run in queries.spans:
            for start, stop in run.path:
                cuts.update((start, stop))
        bounds = sorted(cuts)
        piece_of = {start: piece for piece, start in enumerate(bounds)}
        self._piece_sizes = [stop - start for start, stop in pairwise(bounds)]
        self._query_sizes = [run.queries[1] - run.queries[0] for run in queries.spans]
        self._paths = [
            [piece for start, stop in run.path for piece in range(piece_of[start], piece_of[stop])]
            for run in queries.spans
        ]
        self._path_lengths = [sum(stop - start for start, stop in run.path) for run in queries.spans]
        self._device = device
        self._masks: dict[tuple[int, int, int], Tensor] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None) -> Tensor:
        """See `queries.Kernel`."""
        keys = key.split(self._piece_sizes, dim=2)
        values = value.split(self._piece_sizes, dim=2)
        outputs = []
        for own, path, length in zip(
            query.split(self._query_sizes, dim=2), self._paths, self._path_lengths, strict=True
        ):
            width = length if window is None else min(window, length)
            alone = own.shape[2] == length and width == length
            outputs.append(
                F.scaled_dot_product_attention(
                    own,
                    _joined(keys, path),
                    _joined(values, path),
                    attn_mask=None if alone else self.mask(own.shape[2], length, width),
                    is_causal=alone,
                    scale=scale,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            )
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()

    def mask(self, queries: int, keys: int, window: int) -> Tensor:
        """bool [queries, keys]: causal, aligned at the lower right, at most `window` keys back."""
        size = (queries, keys, window)
        if size not in self._masks:
            ones = torch.ones(queries, keys, dtype=torch.bool, device=self._device)
            self._masks[size] = ones.tril_(keys - queries).triu_(keys - queries - window + 1)
        return self._masks[size]


def _joined(pieces: tuple[Tensor, ...], path: list[int]) -> Tensor:
    return pieces[path[0]] if len(path) == 1 else torch.cat([pieces[piece] for piece in path], dim=2)


_FORWARD, _BACKWARD = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of pairs.

    Attributes:
        queries: the queries, by their place among all that ask.
        keys: the positions they see: all of them, or those up to themselves.
        causal: the latter; queries and keys are then the same positions.
    """

    queries: Span
    keys: Span
    causal: bool


def available(device: torch.device) -> bool:
    """Whether torch has the operators that this kernel calls."""
    return device.type == "cpu" and all(hasattr(torch.ops.aten, name) for name in (_FORWARD, _BACKWARD))


class CpuFlashKernel:
    """A kernel (see `queries.Kernel`) without windows.

    Args:
        queries: who asks.
    """

    def __init__(self, queries: Queries) -> None:
        self.pieces = pieces_of(queries)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None) -> Tensor:
        """See `queries.Kernel`."""
        assert window is None, "a window cuts pieces; SdpaKernel honours it"
        merged: Tensor = _Pieces.apply(query, key, value, self.pieces, scale)  # type: ignore[no-untyped-call]
        return merged.transpose(1, 2)


def pieces_of(queries: Queries) -> list[Piece]:
    """The pairs that are seen, each in one piece; every query's causal piece comes before its others."""
    layout = queries.layout
    causal: list[Piece] = []
    whole: list[Piece] = []
    for run in queries.spans:
        causal.append(Piece(run.queries, run.own, True))
        start = int(layout.segment_starts[np.searchsorted(layout.segment_starts, run.own[0], side="right") - 1])
        if start < run.own[0]:
            whole.append(Piece(run.queries, (start, run.own[0]), False))
    # Stretches of one rollout's own positions whose subtrees end together, beyond the rollout itself.
    segment = np.repeat(np.arange(len(layout.segment_starts) - 1), np.diff(layout.segment_starts))
    change = np.flatnonzero((np.diff(layout.end) != 0) | (np.diff(segment) != 0)) + 1
    first = np.append(0, change)
    last = np.append(change, len(layout))
    below = np.stack([layout.segment_starts[segment[first] + 1], layout.end[first]], axis=1)
    if queries.positions is not None:
        below = np.searchsorted(queries.positions, below)
    for piece in np.flatnonzero(below[:, 0] < below[:, 1]).tolist():
        asked = int(below[piece, 0]), int(below[piece, 1])
        whole.append(Piece(asked, (int(first[piece]), int(last[piece])), False))
    return causal + whole


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, pieces: list[Piece], scale: float | None
    ) -> Tensor:
        attend = getattr(torch.ops.aten, _FORWARD)
        batch, heads, asking, width = query.shape
        # Laid out as the operator lays out its own: a position's heads side by side.
        merged = query.new_empty(batch, asking, heads, width).transpose(1, 2)
        exact = torch.promote_types(query.dtype, torch.float32)
        log_sums = query.new_empty(batch, asking, heads, dtype=exact).transpose(1, 2)
        for piece in pieces:
            asked, seen = slice(*piece.queries), slice(*piece.keys)
            output, log_sum = attend(
                query[:, :, asked], key[:, :, seen], value[:, :, seen], 0.0, piece.causal, scale=scale
            )
            if piece.causal:
                merged[:, :, asked], log_sums[:, :, asked] = output, log_sum
                continue
            before = log_sums[:, :, asked]
            after = torch.logaddexp(before, log_sum)
            kept, added = ((part - after).exp()[..., None].to(output.dtype) for part in (before, log_sum))
            merged[:, :, asked].mul_(kept).addcmul_(output, added)
            log_sums[:, :, asked] = after
        ctx.save_for_backward(query, key, value, merged, log_sums)
        ctx.pieces, ctx.scale = pieces, scale
        return merged

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        retreat = getattr(torch.ops.aten, _BACKWARD)
        query, key, value, merged, log_sums = ctx.saved_tensors
        slopes = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        for piece in ctx.pieces:
            asked, seen = slice(*piece.queries), slice(*piece.keys)
            parts = retreat(
                slope[:, :, asked],
                query[:, :, asked],
                key[:, :, seen],
                value[:, :, seen],
                merged[:, :, asked],
                log_sums[:, :, asked],
                0.0,
                piece.causal,
                scale=ctx.scale,
            )
            for total, part, rows in zip(slopes, parts, (asked, seen, seen), strict=True):
                total[:, :, rows] += part
        return *slopes, None, None
