"""Attention kernels for CUDA devices.

VarlenKernel  variable-length flash attention (`--attention varlen`): half precision, compute capability 8.0 or more
FlexKernel    FlexAttention (`--attention flex`; arXiv 2412.05496): any precision

Shapes: see `attention_kernel.Kernel`.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from critic_train.layers.attention_kernel import Kernel, KernelLacksError, Queries, QuerySpan, Scoring, within_reach
from critic_train.layers.to_device import to_device
from critic_train.rollouts import offsets_from_lengths, repeat_by_length


class VarlenKernel(Kernel):
    """One sequence for every span of queries; its keys are its path from the root, gathered.

    The operator aligns its causal mask at the lower right, where the last query meets the last key: a span of queries
    is the end of its path, so that is the mask it needs, and a window counts tokens of the rollout. The price is one
    copy of the keys and values of every path, which is gone when the layer is done: the backward pass makes it again.

    With chunks, a span is cut where one ends, and its keys are those of its own.

    Args:
        queries: whose attention is computed.
        device: where the trunk is.
        operators: by default torch's.
    """

    def __init__(self, queries: Queries, device: torch.device, operators: "VarlenOperators | None" = None) -> None:
        self._queries = queries
        self._device = device
        # At once, not in the first layer: micro-batches are made in a thread while the device computes others.
        self._sequences: dict[int | None, _Sequences] = {None: _Sequences(queries.spans, device)}
        self._operators = operators or torch_operators()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        if scoring.softcap is not None or scoring.sinks is not None:
            raise KernelLacksError("it computes neither soft caps nor sinks")
        if scoring.chunk not in self._sequences:
            spans = within_reach(self._queries, chunk=scoring.chunk)
            self._sequences[scoring.chunk] = _Sequences(spans, self._device)
        sequences = self._sequences[scoring.chunk]
        # [Q, heads, head_dim], [S, kv_heads, head_dim]
        tensors = [part[0].transpose(0, 1) for part in (query, key, value)]
        window = -1 if scoring.window is None else scoring.window - 1  # keys before a query's own
        output: Tensor = _PathAttention.apply(*tensors, sequences, self._operators, scoring.scale, window)  # type: ignore[no-untyped-call]
        return output[None]


@dataclass(frozen=True, slots=True, kw_only=True)
class VarlenOperators:
    """What `torch.nn.attention.varlen.varlen_attn` calls, on [positions, heads, head_dim].

    Attributes:
        forward: (query, key, value, query offsets, key offsets, most queries, most keys, causal, scale, window) ->
            (output, log-sum-exp, state of random numbers).
        backward: (gradient, query, key, value, output, log-sum-exp, query offsets, key offsets, most queries, most
            keys, causal, state of random numbers, scale, window) -> the gradients of query, key and value.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


class _PathAttention(torch.autograd.Function):
    """Gathers the keys of every path, attends, and adds gradients up in float32 where paths share positions.

    Summed in bf16, as autograd would, the gradient of a prompt that 64 rollouts share is off by about 1 %.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sequences: "_Sequences",
        operators: VarlenOperators,
        scale: float | None,
        window: int,
    ) -> Tensor:
        query = query.contiguous()
        ctx.options = (window == -1, scale, [window, 0])
        gathered = (part.index_select(0, sequences.paths) for part in (key, value))
        output, lse, random_state = operators.forward(query, *gathered, *sequences.bounds, *ctx.options)
        ctx.save_for_backward(query, key, value, output, lse, random_state)
        ctx.sequences, ctx.operators = sequences, operators
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse, random_state = ctx.saved_tensors
        causal, *options = ctx.options
        paths = ctx.sequences.paths
        gathered = (part.index_select(0, paths) for part in (key, value))
        query_gradient, *of_paths = ctx.operators.backward(
            gradient.contiguous(), query, *gathered, output, lse, *ctx.sequences.bounds, causal, random_state, *options
        )
        return query_gradient, *(_summed(part, paths, len(key)) for part in of_paths), None, None, None, None


ROWS_AT_ONCE = 2**16
"""Rows of a gradient that are in float32 at the same time."""


def _summed(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """[size, ...]: rows added up by index in float32, in the rows' dtype."""
    total = rows.new_zeros(size, *rows.shape[1:], dtype=torch.promote_types(rows.dtype, torch.float32))
    for part, at in zip(rows.split(ROWS_AT_ONCE), index.split(ROWS_AT_ONCE), strict=True):
        total.index_add_(0, at, part.to(total.dtype))
    return total.to(rows.dtype)


class _Sequences:
    """Spans of queries and the keys of each, as variable-length attention takes them.

    Attributes:
        paths: int64 [K] on the device, the positions of all paths, span after span.
        bounds: (int32 [spans + 1] on the device, the first query of each span; the same of `paths`; most queries of a
            span; most keys).
    """

    def __init__(self, spans: Sequence[QuerySpan], device: torch.device) -> None:
        bounds = np.asarray([bound for span in spans for bound in span.path], dtype=np.int64)
        num_queries = np.asarray([span.queries[1] - span.queries[0] for span in spans], dtype=np.int64)
        num_keys = np.asarray([sum(stop - start for start, stop in span.path) for span in spans], dtype=np.int64)
        self.paths = to_device(repeat_by_length(bounds[:, 0], bounds[:, 1] - bounds[:, 0]), device)
        self.bounds = (
            to_device(offsets_from_lengths(num_queries).astype(np.int32), device),
            to_device(offsets_from_lengths(num_keys).astype(np.int32), device),
            int(num_queries.max()),
            int(num_keys.max()),
        )


def varlen_available(device: torch.device) -> bool:
    """Whether torch has variable-length attention and the device can run it (compute capability 8.0 or more)."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        torch_operators()
    except (ImportError, AttributeError):
        return False
    return True


@cache
def torch_operators() -> VarlenOperators:
    """torch's, which it registers when its module is imported; key heads are shared wherever there are fewer of them.

    Raises:
        ImportError, AttributeError: this version has none.
    """
    importlib.import_module("torch.nn.attention.varlen")
    operators: Any = torch.ops.torch_attn
    return VarlenOperators(forward=operators._varlen_attn, backward=operators._varlen_attn_backward)


BLOCK = 128
"""Queries, and keys, of a block of FlexAttention."""


class FlexKernel(Kernel):
    """FlexAttention under a block mask that is made on the device from `end` alone.

    A block of queries visits a block of keys iff the first key is not after the last query and the largest `end` of the
    keys is beyond the first query. It attends to the full block iff the last key is not after the first query and the
    smallest `end` is beyond the last query. Two reductions a block decide both; no S x S mask is evaluated. Windows
    are differences of depth, which counts tokens of the rollout; chunks are quotients of it. Sinks are put in by the
    log-sum-exp of the scores.

    On CUDA it is compiled; on a CPU it runs eagerly, without a backward pass.

    Args:
        queries: whose attention is computed.
        device: where the trunk is.
    """

    def __init__(self, queries: Queries, device: torch.device) -> None:
        layout = queries.layout
        self._end = to_device(layout.end, device)  # [S]
        self._depth = to_device(layout.depth, device)  # [S]
        every = torch.arange(len(layout), device=device)
        self._positions = every if queries.positions is None else to_device(queries.positions, device)  # [Q]
        self._masks: dict[tuple[int | None, int | None], BlockMask] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        attend: Any = _compiled() if query.is_cuda else flex_attention
        result = attend(
            query,
            key,
            value,
            score_mod=None if scoring.softcap is None else _soft_cap(scoring.softcap),
            block_mask=self.block_mask(scoring.window, scoring.chunk),
            scale=scoring.scale,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=None if scoring.sinks is None else AuxRequest(lse=True),
        )
        if scoring.sinks is None:
            return result.transpose(1, 2)  # type: ignore[no-any-return]
        output, auxiliary = result
        # One more key, of value 0: what is left to the others is exp(lse) / (exp(lse) + exp(sink)).
        left = torch.sigmoid(auxiliary.lse - scoring.sinks.to(auxiliary.lse.dtype)[None, :, None])
        return (output * left[..., None].to(output.dtype)).transpose(1, 2)  # type: ignore[no-any-return]

    def block_mask(self, window: int | None, chunk: int | None = None) -> BlockMask:
        """The blocks that are visited, those of them without a mask, and the mask of the others."""
        if (window, chunk) not in self._masks:
            visited, full = self._blocks(window, chunk)
            partial_counts, partial_blocks = _block_lists(visited & ~full)
            full_counts, full_blocks = _block_lists(full)
            self._masks[window, chunk] = BlockMask.from_kv_blocks(
                partial_counts,
                partial_blocks,
                full_counts,
                full_blocks,
                BLOCK_SIZE=BLOCK,
                mask_mod=self._mask_mod(window, chunk),
                seq_lengths=(len(self._positions), len(self._end)),
            )
        return self._masks[window, chunk]

    def _mask_mod(self, window: int | None, chunk: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        end, depth, positions = self._end, self._depth, self._positions

        def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            position = positions[query]
            seen = (key <= position) & (position < end[key])
            if window is not None:
                seen = seen & (depth[position] - depth[key] < window)
            if chunk is not None:
                seen = seen & (depth[position] // chunk == depth[key] // chunk)
            return seen

        return attends

    def _blocks(self, window: int | None, chunk: int | None) -> tuple[Tensor, Tensor]:
        """(visited, full), each bool [blocks of queries, blocks of keys]; see the class."""
        keys = torch.arange(len(self._end), device=self._end.device)
        first_query, last_query = _block_extremes(self._positions)
        first_key, last_key = _block_extremes(keys)
        smallest_end, largest_end = _block_extremes(self._end)
        visited = (first_key <= last_query[:, None]) & (largest_end > first_query[:, None])
        full = (last_key <= first_query[:, None]) & (smallest_end > last_query[:, None])
        shallow_query, deep_query = _block_extremes(self._depth[self._positions])
        shallow_key, deep_key = _block_extremes(self._depth)
        if window is not None:
            visited &= shallow_query[:, None] - deep_key < window
            full &= deep_query[:, None] - shallow_key < window
        if chunk is not None:
            visited &= (shallow_query[:, None] // chunk <= deep_key // chunk) & (
                deep_query[:, None] // chunk >= shallow_key // chunk
            )
            full &= (shallow_query[:, None] // chunk == deep_key // chunk) & (
                deep_query[:, None] // chunk == shallow_key // chunk
            )
        # A last block of fewer than BLOCK positions is never full: what is beyond the end must be masked.
        if len(self._positions) % BLOCK:
            full[-1] = False
        if len(keys) % BLOCK:
            full[:, -1] = False
        return visited, full


def _soft_cap(softcap: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def _block_extremes(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """(smallest, largest) number of every block; the last block is filled up with its last number."""
    missing = -len(numbers) % BLOCK
    blocks = torch.cat([numbers, numbers[-1:].expand(missing)]).view(-1, BLOCK)
    return blocks.amin(1), blocks.amax(1)


def _block_lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """BlockMask's form of a bool [query blocks, key blocks]: int32 [1, 1, query blocks] and [1, 1, query blocks, key
    blocks], the number of chosen key blocks of each query block, and all key blocks, the chosen ones first."""
    counts = chosen.sum(1, dtype=torch.int32)
    order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], order[None, None].contiguous()


FLEX_VARIANTS = 64
"""Kinds of calls that may be compiled. Each is one of: with and without gradients; all positions, and those that the
last layer computes; each window, chunk and soft cap. A model with a window has eight. Of more than torch's own limit,
8, the others would not be computed."""


@cache
def _compiled() -> Any:
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, FLEX_VARIANTS)
    # A soft cap is else an input whose value is not known while the graph is made, and flex_attention cannot be traced.
    limits.specialize_float = True
    # dynamic: layouts differ in size from one micro-batch to the next. fullgraph: what cannot be traced is an error, so
    # that another kernel is chosen; torch would compute it eagerly.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)
