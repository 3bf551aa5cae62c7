"""What recurrent layers and short convolutions are given of a tree layout: the calls to make, as indices on the device.

Shapes: S positions of the layout.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from critic_train.layers.prefix_tree import TreeLayout
from critic_train.layers.sequence_parallel import Exchange, SequenceRanks
from critic_train.layers.to_device import to_device
from critic_train.layers.tree_nodes import NodeBatch, node_batches, padded_positions, tree_nodes, with_context
from critic_train.rollouts import offsets_from_lengths, repeat_by_length

CHUNK = 32
"""Positions that a recurrence in torch takes at once. Among 8 to 256 it is the fastest, or nearly, on a CPU."""

LONGEST_NODE = 128
"""Longer nodes are cut into parts where the recurrence is transformers' own: see `tree_nodes`."""

WASTE = 0.25
"""The share by which a node may be shorter than the longest one of its call."""


class TreeStates:
    """What recurrent layers are given of a layout. Everything is made when a layer first asks for it.

    Args:
        layout: the layout.
        device: where the trunk is.
        sequence: the ranks over which the positions are cut, if any.

    Attributes:
        exchange: of this rank's positions for heads or channels; None where positions are not cut over ranks.
    """

    def __init__(self, layout: TreeLayout, device: torch.device, sequence: SequenceRanks | None = None) -> None:
        self.exchange = None if sequence is None else Exchange.of_all(sequence, len(layout))
        self._layout = layout
        self._device = device
        self._contexts: dict[int, ContextSequence] = {}

    def __len__(self) -> int:
        return len(self._layout)

    def with_context(self, context: int) -> "ContextSequence":
        """The sequence of `tree_nodes.with_context`."""
        if context not in self._contexts:
            sequence, index = with_context(self._layout, context)
            is_context = np.ones(len(sequence), dtype=np.bool_)
            is_context[index] = False
            order = np.where(is_context, len(index) + np.cumsum(is_context) - 1, sequence)
            self._contexts[context] = ContextSequence(
                context=self._on_device(sequence[is_context]),
                order=self._on_device(order),
                order_inverse=self._on_device(np.argsort(order)),
                index=self._on_device(index),
                index_inverse=self._on_device(np.where(is_context, len(index), sequence)),
            )
        return self._contexts[context]

    @cached_property
    def padded(self) -> "NodeCalls":
        """Calls with padded rows: several a level, by length; long nodes are cut."""
        nodes = tree_nodes(self._layout, LONGEST_NODE)
        levels = node_batches(nodes, CHUNK, WASTE)
        positions = [padded_positions(nodes, batch.nodes) for level in levels for batch in level]
        shapes = iter(tuple(array.shape) for array in positions)
        calls = [[self._call(batch, next(shapes), None) for batch in level] for level in levels]
        return self._calls(np.concatenate([array.reshape(-1) for array in positions]), calls)

    @cached_property
    def packed(self) -> "NodeCalls":
        """Calls with nodes laid end to end: one a level."""
        nodes = tree_nodes(self._layout)
        levels = node_batches(nodes, 1, waste=1.0)
        positions, calls = [], []
        for (batch,) in levels:
            lengths = nodes.length[batch.nodes]
            bounds = offsets_from_lengths(lengths)
            positions.append(repeat_by_length(nodes.start[batch.nodes], lengths))
            calls.append([self._call(batch, (1, int(bounds[-1])), bounds)])
        return self._calls(np.concatenate(positions), calls)

    def _call(self, batch: NodeBatch, shape: tuple[int, ...], bounds: NDArray[np.int64] | None) -> "NodeCall":
        return NodeCall(
            shape=shape,
            bounds=None if bounds is None else self._on_device(bounds),
            parents=None if batch.parents is None else self._on_device(batch.parents),
            parent_nodes=self._on_device(batch.parent_nodes),
        )

    def _calls(self, positions: NDArray[np.int64], calls: list[list["NodeCall"]]) -> "NodeCalls":
        index = np.empty(len(self._layout) + 1, dtype=np.int64)
        index[positions] = np.arange(len(positions))
        return NodeCalls(positions=self._on_device(positions), index=self._on_device(index[:-1]), levels=calls)

    def _on_device(self, array: NDArray[np.int64]) -> Tensor:
        return to_device(array, self._device)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextSequence:
    """The S positions and C further tokens before them as one sequence of S + C, for convolutions.

    Attributes:
        context: int64 [C], the positions of the further tokens; S where there is none.
        order: int64 [S + C], what follows what: S positions, then `context`.
        order_inverse: int64 [S + C], its inverse.
        index: int64 [S], where each position stands.
        index_inverse: int64 [S + C], the position that stands there, S for a further token.
    """

    context: Tensor
    order: Tensor
    order_inverse: Tensor
    index: Tensor
    index_inverse: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCall:
    """One call of a recurrence.

    Attributes:
        shape: (rows, positions) of its sequences.
        bounds: int64 [nodes + 1], where nodes laid end to end begin and end; None where each has a row.
        parents: int64 [nodes], which of the states kept from the level above each starts from; None: from 0.
        parent_nodes: int64 [k], the nodes whose final states are kept, for others start from them.
    """

    shape: tuple[int, ...]
    bounds: Tensor | None
    parents: Tensor | None
    parent_nodes: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCalls:
    """The calls of a recurrence, level by level.

    Attributes:
        positions: int64 [P], the positions that the calls take, call after call; S where a row is padded.
        index: int64 [S], where each position stands among them.
        levels: the calls.
    """

    positions: Tensor
    index: Tensor
    levels: list[list[NodeCall]]


class _Rearranged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return taken(rows, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return taken(gradient, ctx.saved_tensors[0]), None, None


def rearranged(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Rows in another order; 0 where the index is one beyond the last row.

    No row is taken twice, so its gradient is found by the inverse index; torch would add gradients up row by row.
    """
    rearranged: Tensor = _Rearranged.apply(rows, index, inverse)  # type: ignore[no-untyped-call]
    return rearranged


def taken(rows: Tensor, index: Tensor) -> Tensor:
    """Rows by index; 0 where it is one beyond the last row."""
    return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])]).index_select(0, index)
