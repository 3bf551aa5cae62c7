"""What one micro-batch hands to the model, laid out as a forest or as padded rows.

Both layouts answer the same question, "which value is paired with each response token", so everything after the
trunk is the same for both.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from critic_train.model.attention import TreeAttentionPlan
from critic_train.model.prefix_tree import PrefixOrder, build_tree_layout
from critic_train.rollouts import Rollouts, ragged_take
from critic_train.settings import Attention


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInput:
    """A micro-batch on the device.

    Attributes:
        trunk_arguments: keyword arguments of the trunk.
        read: int64 [R], the flattened positions whose hidden state is turned into a value, each once, ascending.
        read_in_last_layer: int64 [R], their places among the positions that the last layer computes where it is narrowed;
            None where they are just these.
        pair: int64 [M], for every response token the entry of `read` that holds its value.
        tokens: int64 numpy [M], the place of those response tokens in the mini-batch's token arrays.
        computed_tokens: positions that go through the trunk, padding included.
        all_tokens: int64 numpy [A], the place of every token of the micro-batch in the mini-batch's token arrays.
        where: int64 numpy [A], the position of each.
        states: float32 [P, hidden_size], kept states below the layers that are trained, at every position; or, where
            only the head is, [R, hidden_size] states that are read. None where the trunk computes them.
    """

    trunk_arguments: dict[str, Any]
    read_positions: Tensor
    read_in_last_layer: Tensor | None
    value_index: Tensor
    response_tokens: NDArray[np.int64]
    computed_tokens: int
    all_tokens: NDArray[np.int64]
    token_positions: NDArray[np.int64]
    cached_states: Tensor | None = None


class StateSource(Protocol):
    """Where hidden states of a frozen trunk come from."""

    def add_to(self, batch: ModelInput, rollouts: Rollouts) -> ModelInput:
        """A micro-batch with its `states`; `rollouts` is the mini-batch it is a part of."""


def tree_input(
    rollouts: Rollouts, order: PrefixOrder, device: torch.device, attention: Attention = "sdpa"
) -> ModelInput:
    """Lay out a part of a mini-batch as a forest.

    Args:
        rollouts: the whole mini-batch.
        order: the rollouts of this micro-batch.
        device: where the trunk is.
        attention: the kernel, resolved.
    """
    forest = build_tree_layout(rollouts, order)
    asked = _asked(rollouts, np.sort(order.index), forest.token_positions, len(forest))
    plan = TreeAttentionPlan(forest, asked.read, device, attention)
    return ModelInput(
        trunk_arguments={
            "input_ids": _on(device, forest.input_ids)[None],
            "position_ids": _on(device, forest.depth)[None],
            "tree_plan": plan,
        },
        read_positions=_on(device, asked.read),
        read_in_last_layer=_read_of_kept(plan, asked.read, device),
        value_index=_on(device, asked.pair),
        response_tokens=asked.tokens,
        computed_tokens=len(forest),
        all_tokens=asked.all_tokens,
        token_positions=forest.token_positions,
    )


def _read_of_kept(plan: TreeAttentionPlan, read: NDArray[np.int64], device: torch.device) -> Tensor | None:
    same = plan.needed is None or len(plan.needed_positions) == len(read)
    return None if same else _on(device, np.searchsorted(plan.needed_positions, read))


def padded_input(rollouts: Rollouts, index: NDArray[np.int64], device: torch.device) -> ModelInput:
    """Lay out a part of a mini-batch as rows padded on the right, for trunks that cannot take a forest.

    Args:
        rollouts: the whole mini-batch.
        index: int64 [n], the rollouts of this micro-batch.
        device: where the trunk is.
    """
    index = np.sort(index)
    lengths = rollouts.lengths[index]
    width = int(lengths.max())
    tokens, offsets = ragged_take(rollouts.offsets, index)
    # Token t of row i stands at i * width + t.
    where = np.arange(len(tokens)) + np.repeat(np.arange(len(index)) * width - offsets[:-1], lengths)
    ids = np.zeros(len(index) * width, dtype=np.int64)
    seen = np.zeros(len(index) * width, dtype=np.int64)
    ids[where] = rollouts.input_ids[tokens]
    seen[where] = 1
    arguments = {
        "input_ids": _on(device, ids).view(len(index), width),
        "attention_mask": _on(device, seen).view(len(index), width),
    }
    asked = _asked(rollouts, index, where, len(ids))
    return ModelInput(
        trunk_arguments=arguments,
        read_positions=_on(device, asked.read),
        read_in_last_layer=None,
        value_index=_on(device, asked.pair),
        response_tokens=asked.tokens,
        computed_tokens=len(ids),
        all_tokens=asked.all_tokens,
        token_positions=where,
    )


def empty_input(rollouts: Rollouts, device: torch.device, *, forest: bool) -> ModelInput:
    """One position of which no value is asked: for a rank that must go through the trunk while it has no work."""
    one = replace(
        rollouts.take(np.zeros(1, dtype=np.int64)),
        input_ids=rollouts.input_ids[:1],
        offsets=np.asarray([0, 1]),
        response_mask=np.zeros(1, dtype=np.bool_),
    )
    index = np.zeros(1, dtype=np.int64)
    if forest:
        batch = tree_input(one, PrefixOrder(index=index, shared=np.zeros(1, dtype=np.int64)), device)
    else:
        batch = padded_input(one, index, device)
    # That position is no token of the mini-batch's share.
    return replace(batch, all_tokens=batch.all_tokens[:0], token_positions=batch.token_positions[:0])


class _Asked(NamedTuple):
    """What the loss asks of a micro-batch; see ModelInput."""

    tokens: NDArray[np.int64]
    read: NDArray[np.int64]
    pair: NDArray[np.int64]
    all_tokens: NDArray[np.int64]


def _asked(rollouts: Rollouts, index: NDArray[np.int64], where: NDArray[np.int64], computed_tokens: int) -> _Asked:
    tokens, _ = ragged_take(rollouts.offsets, index)
    answered = np.flatnonzero(rollouts.response_mask[tokens])
    # Shift by one: the state that chooses a token is the one before it. Token 0 is never a response token.
    states = where[answered - 1]
    asked = np.zeros(computed_tokens, dtype=np.bool_)
    asked[states] = True
    return _Asked(tokens[answered], np.flatnonzero(asked), (np.cumsum(asked) - 1)[states], tokens)


def _on(device: torch.device, array: NDArray[np.int64]) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    # From pinned memory a copy to the device waits for nothing.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
