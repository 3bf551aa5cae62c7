"""A few rollouts through a trunk in every way in which it may be used: alone, as prefix trees, as padded rows.

Alone, with transformers' own attention and no padding, a rollout's hidden states are right. The other ways are held
against them, on as many positions as a micro-batch has: what depends on a token's place in the row shows only there.

Shapes: T tokens of all tried rollouts.
"""

import contextlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from critic_train.errors import ModelError
from critic_train.layers.attention import TREE_ATTENTION, TreeAttentionPlan
from critic_train.layers.attention_kernel import SHORT_GAP, AttentionCall
from critic_train.layers.masked_attention import repeat_heads
from critic_train.layers.prefix_tree import PrefixOrder, prefix_order
from critic_train.layers.sequence_parallel import SequenceRanks
from critic_train.model.critic import Critic
from critic_train.model.microbatches import forest_micro_batches, part_of, row_micro_batches, same_frequencies
from critic_train.model.model_input import ModelInput, padded_input, tree_input
from critic_train.model.rounding import Rounding
from critic_train.model_files.config import config_size
from critic_train.rollouts import Rollouts, offsets_from_lengths, repeat_by_length

STOCK_ATTENTION = ("sdpa", "eager")
"""transformers' own, the preferred one first."""

MOST_SCORE_BYTES = 2**31
"""Where transformers writes the scores of attention out, rollouts are tried up to a length at which those of a layer
take this much."""

MOST_MASK_BYTES = 2**32
"""Likewise on CUDA where it writes a mask out, which torch copies as float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one way of computing gave.

    Attributes:
        agrees: whether its states are those of rollouts alone, but for rounding.
        difference: the largest difference of a state, relative to the largest state.
        narrowed: whether the last layer computed some positions only.
        calls: what the layers called attention with.
    """

    agrees: bool
    difference: float
    narrowed: bool = False
    calls: frozenset[AttentionCall] = frozenset()


class Trial:
    """Rollouts, and the states that they have alone.

    Args:
        critic: on its device, its trunk with transformers' own attention.
        rollouts: a few, some that share a prompt and the longest among them.
        positions: how many positions a micro-batch may have.
        limit: see `critic_train.model_files.config.frequency_limit`.
        sequence: the ranks over which the positions of prefix trees are cut, if any.

    Raises:
        ModelError: the states are not finite, or depend on what comes after them.
    """

    def __init__(
        self,
        critic: Critic,
        rollouts: Rollouts,
        positions: int,
        limit: int | None,
        sequence: SequenceRanks | None = None,
    ) -> None:
        self._critic, self._positions, self._limit, self._sequence = critic, positions, limit, sequence
        self.rollouts = with_branch(cut(rollouts, _longest_alone(critic)))
        self.alone = Rounding(critic.trunk, self._alone)
        if bool((~torch.isfinite(self.alone.expected)).any()):
            raise ModelError(
                f"{_kind(critic)} gives hidden states that are not finite (NaN or infinite) for a rollout alone",
                hint="its weights are damaged, or its training diverged",
            )
        self._check_causal()

    @torch.no_grad()
    def forest(self, *, few: bool = False) -> Outcome:
        """As prefix trees, with the trunk's present attention; on as many positions as may be, or on a few."""
        differences, agrees, narrowed = [], [], []
        calls: set[AttentionCall] = set()
        positions = 0 if few else self._positions
        for members in self._trees(positions):
            rollouts, order = with_filler(self.rollouts, members, positions)
            batch = tree_input(rollouts, order, self.alone.expected.device, sequence=self._sequence)
            plan: TreeAttentionPlan = batch.trunk_arguments["tree_plan"]
            plan.calls = calls
            states = self._critic.hidden(batch)[batch.value_index]
            own = np.flatnonzero(batch.response_tokens < len(self.rollouts.input_ids))  # not the filler's
            states = states[torch.from_numpy(own).to(states.device)]
            at = torch.from_numpy(batch.response_tokens[own] - 1).to(states.device)
            if self._sequence is not None:
                states, at = _of_all_ranks(self._sequence, states, at, len(self.rollouts.input_ids))
            differences.append(self.alone.difference(states, at))
            agrees.append(self.alone.explains(states, at))
            narrowed.append(plan.narrowed)
        return Outcome(agrees=all(agrees), difference=max(differences), narrowed=all(narrowed), calls=frozenset(calls))

    @torch.no_grad()
    def rows(self) -> Outcome:
        """As rows that are padded to the longest of them."""
        differences, agrees = [], []
        for members in self._parts():
            budget = max(self._positions, 2 * int(self.rollouts.lengths[members].max()))
            for index in row_micro_batches(self.rollouts, budget, members):
                batch = padded_input(self.rollouts, index, self.alone.expected.device)
                states = self._states(batch).flatten(0, 1)[torch.from_numpy(batch.token_positions)]
                at = torch.from_numpy(batch.all_tokens).to(states.device)
                differences.append(self.alone.difference(states, at))
                agrees.append(self.alone.explains(states, at))
        return Outcome(agrees=all(agrees), difference=max(differences))

    def _alone(self) -> Tensor:
        """The states alone, whatever attention the trunk has been given meanwhile."""
        given = self._critic.trunk.config._attn_implementation == TREE_ATTENTION
        use_stock_attention(self._critic)
        try:
            return states_alone(self._critic, self.rollouts)
        finally:
            if given:
                self._critic.trunk.set_attn_implementation(TREE_ATTENTION)

    def _parts(self) -> list[NDArray[np.int64]]:
        return same_frequencies(self.rollouts.lengths, self._limit)

    def _trees(self, positions: int) -> list[NDArray[np.int64]]:
        """The numbers of the rollouts that are tried together: no more positions than a micro-batch has, where two of
        the longest fit; the first rollout and its branch, which comes last, together in any case.
        """
        parts = []
        for members in self._parts():
            budget = max(positions, 2 * int(self.rollouts.lengths[members].max()))
            parts += [np.sort(order.index) for order in forest_micro_batches(self.rollouts, budget, members)]
        branch = np.asarray([0, len(self.rollouts) - 1])
        if not any(np.isin(branch, part).all() for part in parts):
            parts.append(branch)
        return parts

    def _states(self, batch: ModelInput) -> Tensor:
        states: Tensor = self._critic.trunk(use_cache=False, **batch.trunk_arguments).last_hidden_state
        return states

    @torch.no_grad()
    def _check_causal(self) -> None:
        """Refuse a trunk that gives the first half of a rollout other states when the second half is missing."""
        first = self.rollouts.take(np.zeros(1, dtype=np.int64))
        half = max(1, len(first.input_ids) // 2)
        if self._limit is not None and half <= self._limit < len(first.input_ids):
            first = cut(first, self._limit)  # beyond it the model has other frequencies
        both = Rounding(self._critic.trunk, lambda: states_alone(self._critic, first)[:half])
        if not both.explains(states_alone(self._critic, cut(first, half))):
            raise ModelError(
                f"{_kind(self._critic)} looks ahead: a state changes when the tokens after it are missing",
                hint="a critic must be a causal decoder",
            )


def _of_all_ranks(sequence: SequenceRanks, states: Tensor, at: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The states [M, hidden_size] of all ranks, and which of some tokens they belong to, int64 [M] ascending."""
    # A last column says of which tokens there is a state; each token's is on one rank.
    rows = sequence.gathered(F.pad(states, (0, 1), value=1.0), at, tokens)
    at = rows[:, -1].nonzero().squeeze(1)
    return rows[at, :-1], at


def use_stock_attention(critic: Critic) -> None:
    """Set the trunk's attention to transformers' own, for padded rows."""
    trunk = critic.trunk
    for name in STOCK_ATTENTION:
        # An architecture without this implementation raises, or silently keeps the one it had.
        with contextlib.suppress(ValueError):
            trunk.set_attn_implementation(name)
        if trunk.config._attn_implementation == name:
            return
    # An architecture with one implementation only still reads this when it builds its mask.
    trunk.config._attn_implementation = "eager"


@torch.no_grad()
def states_alone(critic: Critic, rollouts: Rollouts) -> Tensor:
    """[T, hidden_size]: every rollout through the trunk by itself."""
    rows = []
    for start, stop in pairwise(rollouts.offsets.tolist()):
        ids = torch.from_numpy(rollouts.input_ids[start:stop].astype(np.int64)).to(critic.device)
        rows.append(critic.trunk(input_ids=ids[None], use_cache=False).last_hidden_state[0])
    return torch.cat(rows)


class HeadsOfTheirOwn(TorchFunctionMode):
    """Gives every head keys of its own in float32 attention on CUDA.

    For heads that share keys torch has no operator there that does not write all scores out: heads x L x L.
    """

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and kwargs.get("enable_gqa") and len(args) >= 3:
            query, key, value, *rest = args
            if query.is_cuda and query.dtype == torch.float32:
                args, kwargs = (query, *repeat_heads(query, key, value), *rest), {**kwargs, "enable_gqa": False}
        return function(*args, **kwargs)


def _longest_alone(critic: Critic) -> int:
    """Tokens of a rollout that are tried, so that its scores of attention do not fill the memory."""
    config = critic.trunk.config
    if config._attn_implementation == "eager":
        return max(2, math.isqrt(MOST_SCORE_BYTES // (4 * max(1, config_size(config, "num_attention_heads")))))
    kinds = getattr(config, "layer_types", None) or ["sliding" if getattr(config, "sliding_window", None) else "full"]
    masked = any(kind.startswith(("sliding", "chunked")) for kind in kinds)
    return math.isqrt(MOST_MASK_BYTES // 5) if masked and critic.device.type == "cuda" else sys.maxsize


def one_long(rollouts: Rollouts, tokens: int) -> Rollouts:
    """The longest rollout whole, the last of them where several are, and the first so many tokens of the others.

    So the time that trying takes grows with one rollout's length: every one goes through the trunk several times.
    """
    lengths = np.minimum(rollouts.lengths, tokens)
    longest = np.flatnonzero(rollouts.lengths == rollouts.lengths.max())[-1]
    lengths[longest] = rollouts.lengths[longest]
    return cut(rollouts, lengths)


def cut(rollouts: Rollouts, tokens: int | NDArray[np.int64]) -> Rollouts:
    """The first tokens of each rollout, at most so many, of all or of each. One left without a response gets one."""
    lengths = np.minimum(rollouts.lengths, tokens)
    tokens_cut = repeat_by_length(rollouts.offsets[:-1], lengths)
    offsets = offsets_from_lengths(lengths)
    mask = rollouts.response_mask[tokens_cut]
    for start, stop in pairwise(offsets.tolist()):
        if not mask[start:stop].any():
            mask[(start + stop + 1) // 2 : stop] = True
    return replace(rollouts, input_ids=rollouts.input_ids[tokens_cut], offsets=offsets, response_mask=mask)


def with_branch(rollouts: Rollouts) -> Rollouts:
    """The rollouts and one more, which branches off from the first one halfway."""
    first, length = rollouts.input_ids[: rollouts.offsets[1]], int(rollouts.offsets[1])
    branch = first.copy()
    branch[length // 2 :] = np.roll(first, 1)[length // 2 :]
    return _with_more(rollouts, [branch], rollouts.response_mask[None, :length])


def with_filler(rollouts: Rollouts, members: NDArray[np.int64], positions: int) -> tuple[Rollouts, PrefixOrder]:
    """Put other rollouts before some in a layout, so that these stand far from the row's start.

    The first of them are not read, so that the last layer has something to leave out; the others are.

    Args:
        rollouts: the others are among them.
        members: int64, their numbers.
        positions: about how many positions the layout is to have.

    Returns:
        (all rollouts, the order of the layout).
    """
    order = part_of(prefix_order(rollouts), members)
    longest = members[rollouts.lengths[members].argmax()]
    tokens = rollouts.input_ids[rollouts.offsets[longest] : rollouts.offsets[longest + 1]]
    own = int((rollouts.lengths[order.index] - order.shared).sum())
    unread = -(-SHORT_GAP // len(tokens))
    count = max(unread, -(-(positions - own) // len(tokens)))
    more = len(rollouts) + np.arange(count)
    mask = np.zeros((count, len(tokens)), dtype=np.bool_)
    mask[unread:, 1:] = True
    return _with_more(rollouts, [np.roll(tokens, shift) for shift in range(count)], mask), PrefixOrder(
        index=np.concatenate([more, order.index]), shared=np.concatenate([np.zeros_like(more), order.shared])
    )


def _with_more(rollouts: Rollouts, more: list[NDArray[np.int32]], response_mask: NDArray[np.bool_]) -> Rollouts:
    """Rollouts, and more of them; bool [rollouts, tokens of each] is their mask."""
    ends = rollouts.offsets[-1] + np.cumsum([len(tokens) for tokens in more])
    return replace(
        rollouts,
        input_ids=np.concatenate([rollouts.input_ids, *more]),
        offsets=np.concatenate([rollouts.offsets, ends]),
        response_mask=np.concatenate([rollouts.response_mask, response_mask.ravel()]),
    )


def _kind(critic: Critic) -> str:
    return str(critic.trunk.config.model_type)
