"""The self-check: on the data at hand, prefix trees must give each rollout the hidden states that it has alone.

With transformers' own attention, shared prefixes go wrong silently (differences of 4 where 1e-6 is right were
measured), and some architectures cannot share at all: recurrent state, other arithmetic of attention. So before a
trunk is used with prefix trees, a few rollouts go through it both ways.

Shapes: T tokens of all sampled rollouts.
"""

import contextlib
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from critic_train.errors import MachineError, ModelError
from critic_train.layers.attention import TREE_ATTENTION, TreeUnsupportedError, choose_attention
from critic_train.layers.prefix_tree import build_tree_layout, prefix_order
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.fsdp import can_reset_after_error, full_precision_params, reset_after_error
from critic_train.model.last_layer import restore_last_layer, skip_unread_positions
from critic_train.model.model_input import tree_input
from critic_train.model.oom import Attempt, release_memory
from critic_train.rollouts import Rollouts
from critic_train.settings import ComputeSettings, Packing

STOCK_ATTENTION = ("sdpa", "eager")
"""transformers' own, the preferred one first."""
TOLERANCE = 1e-3
"""Largest difference of a hidden state allowed, relative to the largest hidden state. Rounding gives about 1e-6."""

SAMPLED_ROLLOUTS = 4
"""Rollouts in a row of a sample, so that some share a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingChoice:
    """How micro-batches are laid out, and why.

    Attributes:
        forest: as prefix trees; else as padded rows.
        difference: the largest difference of a hidden state between prefix trees and rollouts alone, relative to the
            largest hidden state; None if not measured.
        reason: why the trunk gets padded rows though they were not asked for, or an empty string.
    """

    forest: bool
    difference: float | None = None
    reason: str = ""


def select_packing(
    critic: Critic, rollouts: Rollouts, settings: ComputeSettings, compute: Compute
) -> tuple[PackingChoice, list[str]]:
    """Choose packing and attention for a critic, by trying them, and set the trunk's and `compute`'s attention.

    Args:
        critic: on its device.
        rollouts: see `choose_packing`.
        settings: what the user asked for.
        compute: of the job; its `attention` is set.

    Returns:
        (the choice, what to tell the user, in sentences).

    Raises:
        ModelError: see `choose_packing`.
        MachineError: see `choose_attention`; or there is not memory enough for a single rollout.
    """
    messages: list[str] = []
    if compute.checked_rollouts is not None:
        rollouts = _shortest(rollouts, compute.checked_rollouts)
    while True:
        attempt = Attempt(compute.ranks)
        with attempt:
            choice = _try_packing(critic, rollouts, settings, compute, messages)
            compute.ranks.all_reduce_sum(torch.zeros(1))  # no rank is through before all are
            return choice
        longest = int(rollouts.lengths.max())
        rollouts = _fewer_rollouts(critic, rollouts, compute, attempt.error)
        messages = [
            f"memory ran out while the packing was tried on rollouts of up to {longest:,} tokens: "
            f"it was tried up to {int(rollouts.lengths.max()):,} only"
        ]


def _fewer_rollouts(critic: Critic, rollouts: Rollouts, compute: Compute, error: str) -> Rollouts:
    """The shorter half of the rollouts, after memory ran out; ends the run where there is none, or other ranks hang."""
    what = f"memory ran out while the packing was tried on rollouts of up to {int(rollouts.lengths.max()):,} tokens"
    hint = "a smaller model, a lower --max-length, or another --device"
    release_memory(compute.device)
    if compute.ranks.size > 1 or not can_reset_after_error(critic.trunk):
        next_start = {"checked_rollouts": len(rollouts) // 2} if len(rollouts) > 1 else {}
        compute.ranks.end_out_of_memory(what, error.strip()[:99], hint, next_start)
    if len(rollouts) == 1:
        raise MachineError(f"{what}: {error.strip()[:99]}", hint=hint)
    reset_after_error((critic.trunk, critic.head))
    return _shortest(rollouts, len(rollouts) // 2)


def _shortest(rollouts: Rollouts, count: int) -> Rollouts:
    """The shortest of some rollouts, in their order."""
    return rollouts.take(np.sort(np.argsort(rollouts.lengths, kind="stable")[:count]))


def _try_packing(
    critic: Critic, rollouts: Rollouts, settings: ComputeSettings, compute: Compute, messages: list[str]
) -> tuple[PackingChoice, list[str]]:
    with full_precision_params((critic.trunk, critic.head)):
        choice = choose_packing(critic, rollouts, settings.packing)
    messages = [*messages, choice.reason] if choice.reason else messages
    if choice.forest:
        forest = build_tree_layout(rollouts, prefix_order(rollouts))
        compute.attention, passed = choose_attention(settings.attention, forest, compute.device, compute.precision)
        messages = messages + passed
    return choice, messages


def choose_packing(critic: Critic, rollouts: Rollouts, packing: Packing) -> PackingChoice:
    """Decide between prefix trees and padded rows, and set the trunk's attention accordingly.

    Args:
        critic: on its device.
        rollouts: a few to try, some that share a prompt and the longest among them.
        packing: `--packing`; "forest" raises where "auto" falls back to padded rows.

    Raises:
        ModelError: the trunk is no causal decoder, or "forest" is asked for and computes something else here.
    """
    sample = _with_branch(rollouts)
    restore_last_layer(critic.trunk)
    use_stock_attention(critic)
    expected = _states_alone(critic, sample)
    _check_causal(critic, sample, expected)
    if packing == "rows":
        return PackingChoice(forest=False)
    difference: float | None = None
    try:
        critic.trunk.set_attn_implementation(TREE_ATTENTION)
        difference = _difference(critic, sample, expected)
    except TreeUnsupportedError as error:
        reason = f"this architecture's attention uses {error}"
    except (TypeError, ValueError):
        reason = "this architecture takes no attention but its own"
    else:
        reason = "" if difference <= TOLERANCE else f"hidden states differ by {difference:.1e} from rollouts run alone"
    if not reason:
        if skip_unread_positions(critic.trunk) and _difference(critic, sample, expected) > TOLERANCE:
            restore_last_layer(critic.trunk)
        return PackingChoice(forest=True, difference=difference)
    kind = critic.trunk.config.model_type
    if packing == "forest":
        raise ModelError(
            f"{kind} cannot be laid out as a forest: {reason}",
            hint="--packing auto falls back to padded rows, --packing rows asks for them",
        )
    use_stock_attention(critic)
    return PackingChoice(forest=False, difference=difference, reason=f"{kind} gets padded rows: {reason}")


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


def _with_branch(sample: Rollouts) -> Rollouts:
    """The sample and one more rollout, which branches off from the first one halfway."""
    first, length = sample.input_ids[: sample.offsets[1]], int(sample.offsets[1])
    branch = first.copy()
    branch[length // 2 :] = np.roll(first, 1)[length // 2 :]
    return replace(
        sample,
        input_ids=np.concatenate([sample.input_ids, branch]),
        offsets=np.append(sample.offsets, sample.offsets[-1] + length),
        response_mask=np.concatenate([sample.response_mask, sample.response_mask[:length]]),
    )


@torch.no_grad()
def _states_alone(critic: Critic, sample: Rollouts) -> torch.Tensor:
    """[T, hidden_size]: every rollout through the trunk by itself, with transformers' own attention, in float32."""
    rows = []
    for start, stop in pairwise(sample.offsets.tolist()):
        ids = torch.from_numpy(sample.input_ids[start:stop].astype(np.int64)).to(critic.device)
        rows.append(critic.trunk(input_ids=ids[None], use_cache=False).last_hidden_state[0])
    return torch.cat(rows)


@torch.no_grad()
def _difference(critic: Critic, sample: Rollouts, expected: torch.Tensor) -> float:
    """The largest difference of a state that is read between the sample as prefix trees and `expected`, relative."""
    batch = tree_input(sample, prefix_order(sample), expected.device)
    read = expected[torch.from_numpy(batch.response_tokens - 1).to(expected.device)]  # [M, hidden_size]
    return float((critic.hidden(batch)[batch.value_index] - read).abs().max() / expected.abs().max())


def _check_causal(critic: Critic, sample: Rollouts, expected: torch.Tensor) -> None:
    """Refuse a trunk that gives the first half of a rollout other states when the second half is missing."""
    length = int(sample.offsets[1])
    half = max(1, length // 2)
    ids = torch.from_numpy(sample.input_ids[:half].astype(np.int64)).to(expected.device)
    with torch.no_grad():
        states = critic.trunk(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    if float((states - expected[:half]).abs().max() / expected.abs().max()) > TOLERANCE:
        raise ModelError(
            f"{critic.trunk.config.model_type} looks ahead: a state depends on tokens after it",
            hint="a critic must be a causal decoder",
        )
