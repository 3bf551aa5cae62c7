"""Attention kernels that need nothing but torch's scaled-dot-product attention (`--attention sdpa`).

SdpaKernel      calls the public function once for every span of queries, on any device; what that function does not
                compute (soft caps, sinks) is written out
CpuFlashKernel  calls the flash-attention operator of the CPU once for every tile of pairs; no soft caps

Shapes: see `attention_kernel.Kernel`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from critic_train.layers.attention_kernel import Kernel, KernelLacksError, Queries, QuerySpan, Scoring, within_reach
from critic_train.layers.masked_attention import attend_without_scores, lower_right_mask, repeat_heads
from critic_train.layers.prefix_tree import Span

CPU_FLASH = "_scaled_dot_product_flash_attention_for_cpu"
CPU_FLASH_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"

CAUSAL_BLOCK, CAUSAL_STRETCH = 64, 384
"""How a causal tile is cut for the CPU's operator, which of up to 512 keys computes all, those after a query as well. A
stretch is cut into blocks with the keys of the stretch up to their last query; the keys before a stretch are a tile of
their own. Of 384 positions that is 28 % faster than one call."""

SMALLEST_BLOCK, LARGEST_BLOCK = 128, 512
"""Queries that are computed together under a window: about as many as it is long, for fewer are many calls and more
see keys in vain. Where scores are written out, the largest bounds the memory that they take."""


class SdpaKernel(Kernel):
    """One call of scaled-dot-product attention for every span of queries; its keys are its path from the root.

    The last query of a span attends to its full path, so the causal mask is aligned at the lower right. All other
    kernels are compared with this one.

    Args:
        queries: whose attention is computed.
        device: where the masks are made.
    """

    def __init__(self, queries: Queries, device: torch.device) -> None:
        self._queries = queries
        self._device = device
        self._paths: dict[tuple[int | None, int | None, int | None], _Paths] = {}
        self._masks: dict[tuple[int, int, int], Tensor] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        written_out = scoring.softcap is not None or scoring.sinks is not None
        paths = self._reach(scoring, written_out=written_out)
        # In float32, so that what the paths give a shared piece as its gradient is summed in it.
        exact = torch.promote_types(key.dtype, torch.float32)
        keys, values = (part.to(exact).split(paths.piece_sizes, dim=2) for part in (key, value))
        outputs = []
        for own, path, length in zip(query.split(paths.query_sizes, dim=2), paths.pieces, paths.lengths, strict=True):
            width = length if scoring.window is None else min(scoring.window, length)
            # A path without ancestors and without a window that cuts is plain causal attention.
            plain = own.shape[2] == length and width == length and not written_out
            own_keys, own_values = (_concatenate(part, path).to(key.dtype) for part in (keys, values))
            if query.is_cuda and not written_out:
                seen = None if plain else width
                outputs.append(attend_without_scores(own, own_keys, own_values, scoring.scale, seen, self.mask))
                continue
            mask = None if plain else self.mask(own.shape[2], length, width)
            if written_out:
                # The scores are computed again in the backward pass: kept, they would fill the memory.
                attended: Tensor = checkpoint(
                    _written_out,
                    own,
                    own_keys,
                    own_values,
                    mask,
                    scoring,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                attended = F.scaled_dot_product_attention(
                    own,
                    own_keys,
                    own_values,
                    attn_mask=mask,
                    is_causal=plain,
                    scale=scoring.scale,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            outputs.append(attended)
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()

    def mask(self, queries: int, keys: int, window: int) -> Tensor:
        """bool [queries, keys]: causal, aligned at the lower right, at most `window` keys back."""
        size = (queries, keys, window)
        if size not in self._masks:
            self._masks[size] = lower_right_mask(queries, keys, window, self._device)
        return self._masks[size]

    def _reach(self, scoring: Scoring, *, written_out: bool) -> "_Paths":
        block = LARGEST_BLOCK if written_out else None
        if scoring.window is not None:
            block = block_size(scoring.window)
        reach = (scoring.window, scoring.chunk, block)
        if reach not in self._paths:
            spans = within_reach(self._queries, window=scoring.window, chunk=scoring.chunk, block=block)
            self._paths[reach] = _Paths(spans, len(self._queries.layout))
        return self._paths[reach]


class _Paths:
    """Spans of queries and their paths, as pieces into which keys and values are split once.

    The keys of a path are the pieces on it, concatenated. So the backward pass has no scatter-add into the full tensor.
    """

    def __init__(self, spans: Sequence[QuerySpan], positions: int) -> None:
        cuts = {0, positions}
        for span in spans:
            for start, stop in span.path:
                cuts.update((start, stop))
        bounds = sorted(cuts)
        piece_at = {start: piece for piece, start in enumerate(bounds)}
        self.piece_sizes = [stop - start for start, stop in pairwise(bounds)]
        self.query_sizes = [span.queries[1] - span.queries[0] for span in spans]
        self.pieces = [
            [piece for start, stop in span.path for piece in range(piece_at[start], piece_at[stop])] for span in spans
        ]
        self.lengths = [sum(stop - start for start, stop in span.path) for span in spans]


def block_size(window: int) -> int:
    """How many queries are computed together under a window."""
    return min(max(window, SMALLEST_BLOCK), LARGEST_BLOCK)


def _written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: Scoring) -> Tensor:
    """[1, heads, queries, head_dim]: attention of a span, its scores in float32 as transformers' own code has them."""
    key, value = repeat_heads(query, key, value)
    scale = query.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    scores = (query @ key.transpose(2, 3)).float() * scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if scoring.sinks is not None:
        sinks = scoring.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    shares = scores.softmax(-1)[..., : key.shape[2]]
    return shares.to(value.dtype) @ value


def _concatenate(pieces: tuple[Tensor, ...], path: list[int]) -> Tensor:
    return pieces[path[0]] if len(path) == 1 else torch.cat([pieces[piece] for piece in path], dim=2)


def cpu_flash_available(device: torch.device) -> bool:
    """Whether torch has the operators that CpuFlashKernel calls."""
    return device.type == "cpu" and all(hasattr(torch.ops.aten, name) for name in (CPU_FLASH, CPU_FLASH_BACKWARD))


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries and keys whose pairs are computed in one call.

    Attributes:
        queries: indices among the Q queries.
        keys: positions. Each query attends to all of them, or if causal up to itself.
        causal: whether queries and keys are the same positions, under a causal mask.
        window: tokens that a query attends to, of keys that end with the queries' own; None for a tile without mask. As
            many as there are keys is a causal mask that is aligned at the lower right.
    """

    queries: Span
    keys: tuple[Span, ...]
    causal: bool
    window: int | None = None

    @property
    def first(self) -> bool:
        """Whether no tile of these queries comes before this one."""
        return self.causal or self.window is not None


class CpuFlashKernel(Kernel):
    """Attention on the CPU tile by tile.

    Without a window: the pairs that attend and few others, without copies of keys. Every span of queries is cut into
    causal tiles (see CAUSAL_BLOCK). Every stretch of positions that other rollouts branch off from is one tile with all
    queries below it, which are adjacent in the layout. The results of a query's tiles are merged by their log-sum-exp,
    as ring attention does (Liu et al. 2023, arXiv 2310.01889). With a window or chunks: every block of queries is one
    tile with the keys in its reach, under a mask.

    Args:
        queries: whose attention is computed.
    """

    def __init__(self, queries: Queries) -> None:
        self._queries = queries
        self._tilings: dict[tuple[int | None, int | None], _Tiling] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        if scoring.softcap is not None:
            raise KernelLacksError("it computes no soft caps")
        tiling = self.tiling(scoring.window, scoring.chunk)
        output: Tensor = _TiledAttention.apply(query, key, value, scoring.sinks, tiling, scoring.scale)  # type: ignore[no-untyped-call]
        return output.transpose(1, 2)

    def tiling(self, window: int | None, chunk: int | None) -> "_Tiling":
        """The tiles of a layer with a window or chunks."""
        reach = (window, chunk)
        if reach not in self._tilings:
            plain = window is None and chunk is None
            self._tilings[reach] = _Tiling(
                tiles_of(self._queries) if plain else tiles_in_reach(self._queries, window, chunk)
            )
        return self._tilings[reach]


class _Tiling:
    """Tiles, and the masks that they share."""

    def __init__(self, tiles: list[Tile]) -> None:
        self.tiles = tiles
        self._masks: dict[tuple[int, int, int, torch.dtype], Tensor] = {}

    def mask(self, tile: Tile, dtype: torch.dtype) -> Tensor | None:
        """[queries, keys], 0 or -inf, in the dtype of the queries, as the operator wants it."""
        if tile.window is None:
            return None
        queries, keys = tile.queries[1] - tile.queries[0], sum(stop - start for start, stop in tile.keys)
        size = (queries, keys, min(tile.window, keys), dtype)
        if tile.window >= keys and queries <= CAUSAL_BLOCK and keys <= CAUSAL_STRETCH:
            return _causal_mask(dtype)[CAUSAL_BLOCK - queries :, CAUSAL_STRETCH - keys :]
        if size not in self._masks:
            self._masks[size] = _added_mask(*size)
        return self._masks[size]


@cache
def _causal_mask(dtype: torch.dtype) -> Tensor:
    """[CAUSAL_BLOCK, CAUSAL_STRETCH], 0 or -inf: its lower right corner is the mask of fewer queries and keys."""
    return _added_mask(CAUSAL_BLOCK, CAUSAL_STRETCH, CAUSAL_STRETCH, dtype)


def _added_mask(queries: int, keys: int, window: int, dtype: torch.dtype) -> Tensor:
    """[queries, keys]: `lower_right_mask` as it is added to scores, 0 or -inf."""
    seen = lower_right_mask(queries, keys, window, torch.device("cpu"))
    return torch.zeros(queries, keys, dtype=dtype).masked_fill_(~seen, -torch.inf)


def tiles_in_reach(queries: Queries, window: int | None, chunk: int | None) -> list[Tile]:
    """One tile for every block of queries, with all keys that one of its queries attends to."""
    tiles = []
    block = None if window is None else block_size(window)
    for span in within_reach(queries, window=window, chunk=chunk, block=block):
        keys = sum(stop - start for start, stop in span.path)
        # Where the path is the queries' own positions and no window cuts, the operator's own causal mask is enough.
        causal = span.path == (span.own,) and (window is None or window >= keys)
        tiles.append(Tile(span.queries, span.path, causal, None if causal else keys if window is None else window))
    return tiles


def tiles_of(queries: Queries) -> list[Tile]:
    """Every pair that attends, in exactly one tile; the causal tile of every query comes before its others."""
    layout, starts = queries.layout, queries.layout.segment_starts
    causal: list[Tile] = []
    full: list[Tile] = []
    for span in queries.spans:
        start = int(starts[np.searchsorted(starts, span.own[0], side="right") - 1])
        shift = span.queries[0] - span.own[0]  # from a position of the span to its index among the queries
        for stretch in _even_parts(span.own, CAUSAL_STRETCH):
            for block in _even_parts(stretch, CAUSAL_BLOCK):
                rows, keys = (block[0] + shift, block[1] + shift), (stretch[0], block[1])
                begins = block[0] == stretch[0]
                causal.append(Tile(rows, (keys,), begins, None if begins else keys[1] - keys[0]))
            if start < stretch[0]:  # positions of the same segment before the stretch
                full.append(Tile((stretch[0] + shift, stretch[1] + shift), ((start, stretch[0]),), False))
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
        Tile((int(below[i, 0]), int(below[i, 1])), ((int(first[i]), int(stop[i])),), False)
        for i in np.flatnonzero(below[:, 0] < below[:, 1])
    ]
    return causal + full


def _even_parts(span: Span, most: int) -> list[Span]:
    """A span in as few parts as have at most so many positions, all of about one size."""
    start, stop = span
    parts = -(-(stop - start) // most)
    bounds = [start + (stop - start) * part // parts for part in range(parts + 1)]
    return list(pairwise(bounds))


class _TiledAttention(torch.autograd.Function):
    """A Function of our own, because torch's backward of the operator ignores the gradient of the log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, tiling: _Tiling, scale: float | None
    ) -> Tensor:
        attend = getattr(torch.ops.aten, CPU_FLASH)
        batch, heads, num_queries, head_dim = query.shape
        # In memory [1, Q, heads, head_dim], as the operator lays out its own output.
        output = query.new_empty(batch, num_queries, heads, head_dim).transpose(1, 2)
        lse_dtype = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(batch, num_queries, heads, dtype=lse_dtype).transpose(1, 2)  # log-sum-exp of the scores
        for tile in tiling.tiles:
            rows, mask = slice(*tile.queries), tiling.mask(tile, query.dtype)
            keys, values = _at(key, tile.keys), _at(value, tile.keys)
            tile_output, tile_lse = attend(
                query[:, :, rows], keys, values, 0.0, tile.causal, attn_mask=mask, scale=scale
            )
            if tile.first:
                output[:, :, rows], lse[:, :, rows] = tile_output, tile_lse
            else:
                _merge(output[:, :, rows], lse[:, :, rows], tile_output, tile_lse)
        if sinks is not None:
            # One more key, of value 0.
            every = torch.logaddexp(lse, sinks.to(lse_dtype)[None, :, None])
            output.mul_((lse - every).exp()[..., None].to(output.dtype))
            lse = every
        ctx.save_for_backward(query, key, value, sinks, output, lse)
        ctx.tiling, ctx.scale = tiling, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        attend_backward = getattr(torch.ops.aten, CPU_FLASH_BACKWARD)
        *saved, sinks, output, lse = ctx.saved_tensors
        # In float32 whatever the forward pass is in: a shared prompt's keys get a gradient from each of many tiles, and
        # the operator's own backward pass is several times slower in bf16.
        exact = torch.promote_types(grad_output.dtype, torch.float32)
        query, key, value, output, grad_output = (part.to(exact) for part in (*saved, output, grad_output))
        gradients = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        for tile in ctx.tiling.tiles:
            rows = slice(*tile.queries)
            # With the merged output and log-sum-exp, the probabilities of a tile are those of the full attention, so
            # the gradients of the tiles add up. A sink's share is in them, too.
            query_part, key_part, value_part = attend_backward(
                grad_output[:, :, rows],
                query[:, :, rows],
                _at(key, tile.keys),
                _at(value, tile.keys),
                output[:, :, rows],
                lse[:, :, rows],
                0.0,
                tile.causal,
                attn_mask=ctx.tiling.mask(tile, query.dtype),
                scale=ctx.scale,
            )
            gradients[0][:, :, rows] += query_part
            for total, part in ((gradients[1], key_part), (gradients[2], value_part)):
                index = 0
                for start, stop in tile.keys:
                    total[:, :, start:stop] += part[:, :, index : index + stop - start]
                    index += stop - start
        of_inputs = (total.to(tensor.dtype) for total, tensor in zip(gradients, saved, strict=True))
        return *of_inputs, _sink_gradient(grad_output, output, lse, sinks), None, None


def _at(tensor: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """Keys or values at the positions of some spans: a view where there is one span."""
    parts = [tensor[:, :, start:stop] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _merge(output: Tensor, lse: Tensor, tile_output: Tensor, tile_lse: Tensor) -> None:
    """Merge one more tile into what the tiles before it gave, in place."""
    # output = exp(old - new) * output + exp(tile - new) * tile_output, where new = log(exp(old) + exp(tile))
    new_lse = torch.logaddexp(lse, tile_lse)
    old_share, tile_share = ((part - new_lse).exp()[..., None].to(tile_output.dtype) for part in (lse, tile_lse))
    output.mul_(old_share).addcmul_(tile_output, tile_share)
    lse.copy_(new_lse)


def _sink_gradient(grad_output: Tensor, output: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor | None:
    """The gradient of the sinks, [heads].

    A score s_j with share p_j and value v_j has the gradient p_j (g v_j - g o), for the output's gradient g and the
    output o; the value of a sink is 0.
    """
    if sinks is None:
        return None
    shares = (sinks.to(lse.dtype)[None, :, None] - lse).exp()  # [1, heads, Q]
    along = (grad_output.to(lse.dtype) * output).sum(-1)
    return -(shares * along).sum((0, 2)).to(sinks.dtype)
