"""A micro-batch as the model takes it: laid out as prefix trees, or as padded rows.

Both layouts say which position holds the value of which response token, so that everything after the trunk is the
same for both. Shapes:

    P   positions that go through the trunk, padding included: [1, S] of a tree layout, [rows, width] of padded rows
    A   tokens of the micro-batch                 M   response tokens among them
    R   positions whose hidden state is read, R <= M: rollouts that share a prefix read one position together
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from critic_train.layers.attention import TreeAttentionPlan
from critic_train.layers.prefix_tree import PrefixOrder, Span, build_tree_layout, with_padding
from critic_train.layers.sequence_parallel import SequenceRanks
from critic_train.layers.to_device import to_device
from critic_train.rollouts import Rollouts, ragged_take
from critic_train.settings import Attention


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensOfAllRanks:
    """The response tokens of a micro-batch that several ranks cut among them: what a rollout's mean runs over.

    Attributes:
        sequence: the ranks.
        token_index: int64 [all], see ModelInput.
        value_index: int64 [all], for every token the entry of all read positions.
        here: int64 [M], which of them are this rank's, ascending.
        reads_here: int64 [R], which of all read positions are this rank's, ascending.
        read_positions: how many there are.
    """

    sequence: SequenceRanks
    token_index: Tensor
    value_index: Tensor
    here: Tensor
    reads_here: Tensor
    read_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInput:
    """A micro-batch on the device.

    Attributes:
        trunk_arguments: keyword arguments of the trunk.
        read_positions: int64 [R], ascending: the positions, flattened, whose hidden state is turned into a value.
        read_in_last_layer: int64 [R], their indices among the positions that the last layer computes; None where it
            computes them and no others, or all positions.
        value_index: int64 [M], for every response token the entry of `read_positions` that holds its value.
        value_index_on_host: int64 numpy [M], the same.
        token_index: int64 [M], the index of every response token among those of its rollout, from 0.
        response_tokens: int64 numpy [M], indices of those response tokens in the token arrays of the mini-batch.
        computed_tokens: P.
        all_tokens: int64 numpy [A], indices of all tokens of the micro-batch in the token arrays of the mini-batch.
        token_positions: int64 numpy [A], the position of each of them, flattened.
        of_all_ranks: these tokens and those of the other ranks that cut the micro-batch among them; None where none do.
        cached_states: hidden states of the frozen trunk, float32: [P, hidden_size] that enter the trained layers, or
            [R, hidden_size] that enter the head where it alone is trained. None where the trunk computes them.
    """

    trunk_arguments: dict[str, Any]
    read_positions: Tensor
    read_in_last_layer: Tensor | None
    value_index: Tensor
    value_index_on_host: NDArray[np.int64]
    token_index: Tensor
    response_tokens: NDArray[np.int64]
    computed_tokens: int
    all_tokens: NDArray[np.int64]
    token_positions: NDArray[np.int64]
    of_all_ranks: TokensOfAllRanks | None = None
    cached_states: Tensor | None = None


class StateSource(Protocol):
    """Where the cached hidden states of a frozen trunk come from."""

    def add_to(self, batch: ModelInput, rollouts: Rollouts) -> ModelInput:
        """Return the micro-batch with its `cached_states`; `rollouts` is the mini-batch that it is a part of."""


def tree_input(
    rollouts: Rollouts,
    order: PrefixOrder,
    device: torch.device,
    attention: Attention = "sdpa",
    sequence: SequenceRanks | None = None,
) -> ModelInput:
    """Lay out a part of a mini-batch as prefix trees.

    Args:
        rollouts: the mini-batch.
        order: the rollouts of this micro-batch.
        device: where the trunk is.
        attention: the kernel, resolved (not auto).
        sequence: the ranks over which the positions are cut, if any. What is returned is then the part of this rank:
            its positions, numbered from the first of them, and the tokens whose value is read there.
    """
    layout = build_tree_layout(rollouts, order)
    reading = _reading(rollouts, np.sort(order.index), layout.token_positions, len(layout))
    if sequence is not None:
        layout = with_padding(layout, sequence.size)
    first, stop = (0, len(layout)) if sequence is None else sequence.span(len(layout))
    plan = TreeAttentionPlan(layout, reading.positions, device, attention, sequence)
    of_all_ranks = None
    if sequence is not None:
        reading, of_all_ranks = _of_span(reading, (first, stop), sequence, device)
    read_in_last_layer = None
    if plan.needed is not None and len(plan.needed_positions) != len(reading.positions):
        read_in_last_layer = to_device(np.searchsorted(plan.needed_positions, reading.positions), device)
    return ModelInput(
        trunk_arguments={
            "input_ids": to_device(layout.input_ids[first:stop], device)[None],  # [1, S]
            "position_ids": to_device(layout.depth[first:stop], device)[None],  # [1, S]
            "tree_plan": plan,
        },
        read_positions=to_device(reading.positions, device),
        read_in_last_layer=read_in_last_layer,
        value_index=to_device(reading.value_index, device),
        value_index_on_host=reading.value_index,
        token_index=to_device(reading.token_index, device),
        response_tokens=reading.response_tokens,
        computed_tokens=stop - first,
        all_tokens=reading.all_tokens,
        token_positions=reading.token_positions,
        of_all_ranks=of_all_ranks,
    )


def padded_input(
    rollouts: Rollouts, index: NDArray[np.int64], device: torch.device, *, masked: bool = True
) -> ModelInput:
    """Lay out a part of a mini-batch as rows padded on the right, for trunks that cannot take prefix trees.

    Args:
        rollouts: the mini-batch.
        index: int64 [n], the rollouts of this micro-batch.
        device: where the trunk is.
        masked: give the trunk a mask; without one, `index` must be a single rollout.
    """
    index = np.sort(index)
    lengths = rollouts.lengths[index]
    width = int(lengths.max())
    tokens, offsets = ragged_take(rollouts.offsets, index)
    # Token t of row i is at position i * width + t.
    token_positions = np.arange(len(tokens)) + np.repeat(np.arange(len(index)) * width - offsets[:-1], lengths)
    ids = np.zeros(len(index) * width, dtype=np.int64)
    mask = np.zeros(len(index) * width, dtype=np.int64)
    ids[token_positions] = rollouts.input_ids[tokens]
    mask[token_positions] = 1
    reading = _reading(rollouts, index, token_positions, len(ids))
    return ModelInput(
        trunk_arguments={
            "input_ids": to_device(ids, device).view(len(index), width),  # [rows, width]
            **({"attention_mask": to_device(mask, device).view(len(index), width)} if masked else {}),  # [rows, width]
        },
        read_positions=to_device(reading.positions, device),
        read_in_last_layer=None,
        value_index=to_device(reading.value_index, device),
        value_index_on_host=reading.value_index,
        token_index=to_device(reading.token_index, device),
        response_tokens=reading.response_tokens,
        computed_tokens=len(ids),
        all_tokens=reading.all_tokens,
        token_positions=reading.token_positions,
    )


def empty_input(
    rollouts: Rollouts, device: torch.device, *, forest: bool, sequence: SequenceRanks | None = None
) -> ModelInput:
    """One position and no response token, for a rank without work: its layers must be gathered with the others'."""
    one = replace(
        rollouts.take(np.zeros(1, dtype=np.int64)),
        input_ids=rollouts.input_ids[:1],
        offsets=np.asarray([0, 1]),
        response_mask=np.zeros(1, dtype=np.bool_),
    )
    index = np.zeros(1, dtype=np.int64)
    if forest:
        batch = tree_input(one, PrefixOrder(index=index, shared=np.zeros(1, dtype=np.int64)), device, sequence=sequence)
    else:
        batch = padded_input(one, index, device)
    # The position stands for no token of this rank's share of the mini-batch.
    return replace(batch, all_tokens=batch.all_tokens[:0], token_positions=batch.token_positions[:0])


class _Reading(NamedTuple):
    """Which positions hold the values of the response tokens; see ModelInput."""

    response_tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    value_index: NDArray[np.int64]
    token_index: NDArray[np.int64]
    all_tokens: NDArray[np.int64]
    token_positions: NDArray[np.int64]


def _reading(
    rollouts: Rollouts, index: NDArray[np.int64], token_positions: NDArray[np.int64], computed_tokens: int
) -> _Reading:
    tokens, offsets = ragged_take(rollouts.offsets, index)
    response = np.flatnonzero(rollouts.response_mask[tokens])
    # Shift by one: the state in which a token is chosen is that of the token before it, which exists, for the first
    # token of a rollout is never a response token.
    positions = token_positions[response - 1]  # [M], with repetitions where rollouts share a prefix
    is_read = np.zeros(computed_tokens, dtype=np.bool_)
    is_read[positions] = True
    rank = np.cumsum(is_read) - 1  # [P], the index of a read position among those that are read
    firsts = np.searchsorted(response, offsets)
    token_index = np.arange(len(response)) - np.repeat(firsts[:-1], np.diff(firsts))
    return _Reading(tokens[response], np.flatnonzero(is_read), rank[positions], token_index, tokens, token_positions)


def _of_span(
    of_all: _Reading, span: Span, sequence: SequenceRanks, device: torch.device
) -> tuple[_Reading, TokensOfAllRanks]:
    """The part of a reading that is read at the positions of a span, numbered from the first of them."""
    first, stop = span
    reads = np.flatnonzero((of_all.positions >= first) & (of_all.positions < stop))
    tokens = np.flatnonzero(np.isin(of_all.value_index, reads))
    placed = (of_all.token_positions >= first) & (of_all.token_positions < stop)
    part = _Reading(
        response_tokens=of_all.response_tokens[tokens],
        positions=of_all.positions[reads] - first,
        value_index=np.searchsorted(reads, of_all.value_index[tokens]),
        token_index=of_all.token_index[tokens],
        all_tokens=of_all.all_tokens[placed],
        token_positions=of_all.token_positions[placed] - first,
    )
    return part, TokensOfAllRanks(
        sequence=sequence,
        token_index=to_device(of_all.token_index, device),
        value_index=to_device(of_all.value_index, device),
        here=to_device(tokens, device),
        reads_here=to_device(reads, device),
        read_positions=len(of_all.positions),
    )
