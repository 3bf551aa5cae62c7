"""Attention kernels that need nothing but torch's scaled-dot-product attention (`--attention sdpa`).

SdpaKernel      calls the public function once for every span of queries, on any device, with windows
CpuFlashKernel  calls the flash-attention operator of the CPU once for every tile of pairs, without windows

Shapes: see `attention_kernel.Kernel`.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from critic_train.layers.attention_kernel import Kernel, Queries
from critic_train.layers.prefix_tree import Span

CPU_FLASH = "_scaled_dot_product_flash_attention_for_cpu"
CPU_FLASH_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"


class SdpaKernel(Kernel):
    """One call of scaled-dot-product attention for every span of queries; its keys are its path from the root.

    The last query of a span attends to its full path, so the causal mask is aligned at the lower right. All other
    kernels are compared with this one.

    Args:
        queries: whose attention is computed.
        device: where the masks are made.
    """

    def __init__(self, queries: Queries, device: torch.device) -> None:
        # Keys and values are split once, at every point where any path is cut; the keys of a path are the pieces on
        # it, concatenated. So the backward pass has no scatter-add into the full tensor.
        cuts = {0, len(queries.layout)}
        for span in queries.spans:
            for start, stop in span.path:
                cuts.update((start, stop))
        bounds = sorted(cuts)
        piece_at = {start: piece for piece, start in enumerate(bounds)}
        self._piece_sizes = [stop - start for start, stop in pairwise(bounds)]
        self._query_sizes = [span.queries[1] - span.queries[0] for span in queries.spans]
        self._paths = [
            [piece for start, stop in span.path for piece in range(piece_at[start], piece_at[stop])]
            for span in queries.spans
        ]
        self._path_lengths = [sum(stop - start for start, stop in span.path) for span in queries.spans]
        self._device = device
        self._masks: dict[tuple[int, int, int], Tensor] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None) -> Tensor:
        keys = key.split(self._piece_sizes, dim=2)
        values = value.split(self._piece_sizes, dim=2)
        outputs = []
        for own, path, length in zip(
            query.split(self._query_sizes, dim=2), self._paths, self._path_lengths, strict=True
        ):
            width = length if window is None else min(window, length)
            # A path without ancestors and without a window that cuts is plain causal attention.
            plain = own.shape[2] == length and width == length
            outputs.append(
                F.scaled_dot_product_attention(
                    own,
                    _concatenate(keys, path),
                    _concatenate(values, path),
                    attn_mask=None if plain else self.mask(own.shape[2], length, width),
                    is_causal=plain,
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


def _concatenate(pieces: tuple[Tensor, ...], path: list[int]) -> Tensor:
    return pieces[path[0]] if len(path) == 1 else torch.cat([pieces[piece] for piece in path], dim=2)


def cpu_flash_available(device: torch.device) -> bool:
    """Whether torch has the operators that CpuFlashKernel calls."""
    return device.type == "cpu" and all(hasattr(torch.ops.aten, name) for name in (CPU_FLASH, CPU_FLASH_BACKWARD))


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of (query, key) pairs of the attention matrix.

    Attributes:
        queries: indices among the Q queries.
        keys: positions. Each query attends to all of them, or if causal up to itself.
        causal: whether queries and keys are the same positions, under a causal mask.
    """

    queries: Span
    keys: Span
    causal: bool


class CpuFlashKernel(Kernel):
    """Attention on the CPU tile by tile: exactly the pairs that attend, without masks and without copies of keys.

    Every span of queries is a causal tile. Every stretch of positions that other rollouts branch off from is one tile
    with all queries below it, which are adjacent in the layout. The results of a query's tiles are merged by their
    log-sum-exp, as ring attention does (Liu et al. 2023, arXiv 2310.01889).

    Args:
        queries: whose attention is computed.
    """

    def __init__(self, queries: Queries) -> None:
        self.tiles = tiles_of(queries)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None) -> Tensor:
        assert window is None, "CpuFlashKernel has no windows; SdpaKernel has"
        output: Tensor = _TiledAttention.apply(query, key, value, self.tiles, scale)  # type: ignore[no-untyped-call]
        return output.transpose(1, 2)


def tiles_of(queries: Queries) -> list[Tile]:
    """Every pair that attends, in exactly one tile; the causal tile of every query comes before its others."""
    layout, starts = queries.layout, queries.layout.segment_starts
    causal: list[Tile] = []
    full: list[Tile] = []
    for span in queries.spans:
        causal.append(Tile(span.queries, span.own, True))
        start = int(starts[np.searchsorted(starts, span.own[0], side="right") - 1])
        if start < span.own[0]:  # positions of the same segment before the span
            full.append(Tile(span.queries, (start, span.own[0]), False))
    # Cut the segments into stretches of positions whose subtrees end together. The rollouts that branch off from a
    # stretch are adjacent: they begin where its segment ends, and end where its subtrees end.
    segment = np.repeat(np.arange(len(starts) - 1), np.diff(starts))  # [S]
    change = np.flatnonzero((np.diff(layout.end) != 0) | (np.diff(segment) != 0)) + 1
    first = np.append(0, change)
    stop = np.append(change, len(layout))
    below = np.stack([starts[segment[first] + 1], layout.end[first]], axis=1)
    if queries.positions is not None:  # from positions to indices among the queries
        below = np.searchsorted(queries.positions, below)
    full += [
        Tile((int(below[i, 0]), int(below[i, 1])), (int(first[i]), int(stop[i])), False)
        for i in np.flatnonzero(below[:, 0] < below[:, 1])
    ]
    return causal + full


class _TiledAttention(torch.autograd.Function):
    """A Function of our own, because torch's backward of the operator ignores the gradient of the log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], scale: float | None) -> Tensor:
        attend = getattr(torch.ops.aten, CPU_FLASH)
        batch, heads, num_queries, head_dim = query.shape
        # In memory [1, Q, heads, head_dim], as the operator lays out its own output.
        output = query.new_empty(batch, num_queries, heads, head_dim).transpose(1, 2)
        lse_dtype = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(batch, num_queries, heads, dtype=lse_dtype).transpose(1, 2)  # log-sum-exp of the scores
        for tile in tiles:
            rows, columns = slice(*tile.queries), slice(*tile.keys)
            tile_output, tile_lse = attend(
                query[:, :, rows], key[:, :, columns], value[:, :, columns], 0.0, tile.causal, scale=scale
            )
            if tile.causal:  # the first tile of these queries
                output[:, :, rows], lse[:, :, rows] = tile_output, tile_lse
                continue
            # output = exp(old - new) * output + exp(tile - new) * tile_output, where new = log(exp(old) + exp(tile))
            old_lse = lse[:, :, rows]
            new_lse = torch.logaddexp(old_lse, tile_lse)
            old_share, tile_share = (
                (part - new_lse).exp()[..., None].to(tile_output.dtype) for part in (old_lse, tile_lse)
            )
            output[:, :, rows].mul_(old_share).addcmul_(tile_output, tile_share)
            lse[:, :, rows] = new_lse
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.tiles, ctx.scale = tiles, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        attend_backward = getattr(torch.ops.aten, CPU_FLASH_BACKWARD)
        query, key, value, output, lse = ctx.saved_tensors
        gradients = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        for tile in ctx.tiles:
            rows, columns = slice(*tile.queries), slice(*tile.keys)
            # With the merged output and log-sum-exp, the probabilities of a tile are those of the full attention, so
            # the gradients of the tiles add up.
            tile_gradients = attend_backward(
                grad_output[:, :, rows],
                query[:, :, rows],
                key[:, :, columns],
                value[:, :, columns],
                output[:, :, rows],
                lse[:, :, rows],
                0.0,
                tile.causal,
                scale=ctx.scale,
            )
            for total, part, where in zip(gradients, tile_gradients, (rows, columns, columns), strict=True):
                total[:, :, where] += part
        return *gradients, None, None
