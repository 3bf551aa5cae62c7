"""The self-check: on the data at hand, a packing must give each rollout the hidden states that it has alone.

With transformers' own attention, shared prefixes go wrong silently (differences of 4 where 1e-6 is right were
measured), and some architectures cannot share at all, or not even stand beside each other in padded rows. So before a
trunk is used, a few rollouts go through it in each way.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from critic_train.distributed.rank_errors import looks_lost
from critic_train.errors import CriticTrainError, MachineError, ModelError, first_line
from critic_train.layers.attention import TREE_ATTENTION, TreeUnsupportedError
from critic_train.layers.attention_kernel import AttentionCall
from critic_train.layers.kernel_choice import choose_attention
from critic_train.layers.prefix_tree import build_tree_layout, prefix_order
from critic_train.layers.recurrence import unshared_states
from critic_train.layers.sequence_parallel import SequenceRanks
from critic_train.model.automatic import MOST_TOKENS
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.fsdp import can_reset_after_error, full_precision_params, reset_after_error
from critic_train.model.last_layer import restore_last_layer, skip_unread_positions
from critic_train.model.microbatches import frequency_limit
from critic_train.model.oom import Attempt, is_out_of_memory, release_memory
from critic_train.model.tiles import compute_at_once, compute_in_tiles
from critic_train.model.trial import (
    HeadsOfTheirOwn,
    Outcome,
    Trial,
    cut,
    one_long,
    states_alone,
    use_stock_attention,
    with_branch,
)
from critic_train.model_files.randomness import silence
from critic_train.rollouts import Rollouts
from critic_train.settings import ComputeSettings, Packing
from critic_train.stopping import Stopped

LONG = 16_384
"""Tokens of a rollout beyond which the trunk is tried in tiles, and on no other rollout as a whole than the longest."""
KERNEL_TOKENS = 512
"""Tokens of each rollout on which the kernels of attention are compared."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingChoice:
    """How micro-batches are laid out, and why.

    Attributes:
        forest: as prefix trees; else as padded rows.
        difference: the largest difference of a hidden state between prefix trees and rollouts alone, relative to the
            largest hidden state; None if not measured.
        reason: why the trunk gets padded rows though they were not asked for, or an empty string.
        one_row: why rows go through the trunk one at a time, or an empty string.
        narrowed: whether the last layer of a forest computes only the positions that are read.
        silenced: how training mode is kept from drawing at random.
        calls: what the layers call attention with, on a forest.
    """

    forest: bool
    difference: float | None = None
    reason: str = ""
    one_row: str = ""
    narrowed: bool = False
    silenced: tuple[str, ...] = ()
    calls: frozenset[AttentionCall] = frozenset()


def select_packing(
    critic: Critic, rollouts: Rollouts, settings: ComputeSettings, compute: Compute, *, tokens: int | None = None
) -> tuple[PackingChoice, list[str]]:
    """Choose packing and attention for a critic, by trying them, and set the trunk's and `compute`'s attention.

    Args:
        critic: on its device.
        rollouts: see `choose_packing`.
        settings: what the user asked for.
        compute: of the job; `attention`, `frequency_limit` and `one_row` are set.
        tokens: the most that are computed in one pass; None where that is not known.

    Returns:
        (the choice, what to tell the user, in sentences).

    Raises:
        ModelError: see `choose_packing`.
        MachineError: see `choose_attention`; or there is not memory enough for a single rollout.
    """
    messages: list[str] = []
    rollouts = one_long(rollouts, LONG)
    chosen_later = settings.max_tokens is None and compute.device.type == "cuda"
    positions = MOST_TOKENS if chosen_later else compute.max_tokens
    if compute.sequence is not None:
        # Each rank computes rollouts alone as well: up to a length that it can.
        rollouts = cut(rollouts, max(2, compute.max_tokens))
        positions = compute.max_tokens * compute.sequence_size
    positions = positions if tokens is None else min(positions, tokens)
    if compute.checked_rollouts is not None:  # memory ran out on several ranks, in a start before this one
        rollouts, positions = _shortest(rollouts, compute.checked_rollouts), 0
    while True:
        attempt = Attempt(compute.ranks)
        with attempt:
            choice = _try_packing(critic, rollouts, settings, compute, positions, messages)
            compute.ranks.all_reduce_sum(torch.zeros(1))  # no rank is through before all are
            return choice
        longest = int(rollouts.lengths.max())
        if positions > longest and compute.ranks.size == 1 and can_reset_after_error(critic.trunk):
            positions //= 2  # where a micro-batch of this size does not fit, smaller ones are computed
            reset_after_error((critic.trunk, critic.head))
            release_memory(compute.device)
            continue
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
    critic: Critic,
    rollouts: Rollouts,
    settings: ComputeSettings,
    compute: Compute,
    positions: int,
    messages: list[str],
) -> tuple[PackingChoice, list[str]]:
    with (
        _tiles_where_long(critic, int(rollouts.lengths.max())),
        full_precision_params((critic.trunk, critic.head)),
        HeadsOfTheirOwn(),
    ):
        choice = choose_packing(critic, rollouts, settings.packing, positions=positions, sequence=compute.sequence)
    compute.frequency_limit = frequency_limit(critic.trunk.config)
    compute.one_row = bool(choice.one_row)
    if choice.silenced:
        messages = [*messages, f"training mode draws at random, and is kept from it: {', '.join(choice.silenced)}"]
    messages = messages + [reason for reason in (choice.reason, choice.one_row) if reason]
    if choice.forest:
        branching = with_branch(cut(rollouts, KERNEL_TOKENS))
        forest = build_tree_layout(branching, prefix_order(branching))
        compute.attention, passed = choose_attention(
            settings.attention, choice.calls, forest, compute.device, compute.precision
        )
        messages = messages + passed
    return choice, messages


@contextmanager
def _tiles_where_long(critic: Critic, tokens: int) -> Iterator[None]:
    """Inside, the trunk computes in tiles if the longest rollout has more than LONG tokens. All ranks call it.

    The passes are in float32 and have more positions than those of a step: what MLPs hold of all positions at once
    would be the most of all. A trunk that cannot be tried in that way is left as it is.
    """
    if tokens <= LONG:
        yield
        return
    restore_last_layer(critic.trunk)
    use_stock_attention(critic)
    _tried(critic, lambda: compute_in_tiles(critic))
    try:
        yield
    finally:
        compute_at_once(critic.trunk)


def choose_packing(
    critic: Critic,
    rollouts: Rollouts,
    packing: Packing,
    *,
    positions: int = 0,
    sequence: SequenceRanks | None = None,
) -> PackingChoice:
    """Decide between prefix trees and padded rows, and set the trunk's attention accordingly.

    Args:
        critic: on its device.
        rollouts: a few to try, some that share a prompt and the longest among them.
        packing: `--packing`; "forest" raises where "auto" falls back to padded rows.
        positions: how many a micro-batch may have; prefix trees and rows are tried with about as many.
        sequence: the ranks over which the positions of prefix trees are cut, if any.

    Raises:
        ModelError: the trunk is no causal decoder, draws at random, or gives NaN; or "forest" is asked for and computes
            something else here.
    """
    kind = critic.trunk.config.model_type
    restore_last_layer(critic.trunk)
    use_stock_attention(critic)
    shortest = _shortest(rollouts, 1)
    with _architectures_errors(critic):
        silenced = tuple(silence(critic.trunk, lambda: states_alone(critic, shortest)))
        trial = Trial(critic, rollouts, positions, frequency_limit(critic.trunk.config), sequence)
    outcome, reason = (None, "") if packing == "rows" else _try_forest(critic, trial)
    if outcome is not None and not reason:
        return PackingChoice(
            forest=True,
            difference=outcome.difference,
            narrowed=outcome.narrowed,
            silenced=silenced,
            calls=outcome.calls,
        )
    if packing == "forest":
        raise ModelError(
            f"{kind} cannot be laid out as a forest: {reason}",
            hint="--packing auto falls back to padded rows, --packing rows asks for them",
        )
    use_stock_attention(critic)
    return PackingChoice(
        forest=False,
        difference=None if outcome is None else outcome.difference,
        reason=f"{kind} gets padded rows: {reason}" if reason else "",
        one_row=_try_rows(critic, trial),
        silenced=silenced,
    )


@contextmanager
def _architectures_errors(critic: Critic) -> Iterator[None]:
    """Inside, whatever an architecture's own code raises on a rollout alone is the model's error."""
    try:
        yield
    except (CriticTrainError, Stopped):
        raise
    except Exception as error:
        if is_out_of_memory(error) or looks_lost(error):
            raise
        raise ModelError(
            f"{critic.trunk.config.model_type} cannot compute a rollout alone, with transformers' own attention: "
            f"{type(error).__name__}: {first_line(error)}",
            hint="its config.json does not fit its architecture, or transformers does not support it here",
        ) from error


def _try_forest(critic: Critic, trial: Trial) -> tuple[Outcome | None, str]:
    """What prefix trees gave, and why they are not used; set up with the last layer narrowed where that is right."""
    try:
        critic.trunk.set_attn_implementation(TREE_ATTENTION)
    except ValueError:
        return None, "this architecture takes no attention but its own"
    outcome, reason = _tried(critic, lambda: trial.forest(few=True))  # what is wrong is mostly wrong here already
    if outcome is not None and outcome.agrees:
        if skip_unread_positions(critic.trunk):
            narrowed, _ = _tried(critic, trial.forest)
            if narrowed is not None and narrowed.agrees:
                return narrowed, ""
            restore_last_layer(critic.trunk)
        outcome, reason = _tried(critic, trial.forest)
    if outcome is not None and not outcome.agrees:
        reason = (
            f"hidden states differ by {outcome.difference:.1e} from rollouts run alone, "
            f"where rounding gives {trial.alone.rounding():.0e}"
        )
        if layers := unshared_states(critic.trunk):
            reason = f"its layers carry a recurrent state that cannot be shared ({', '.join(layers)}): {reason}"
        elif not outcome.calls:
            reason = "its layers do not compute by the attention that they are given"
    return outcome, reason


def _try_rows(critic: Critic, trial: Trial) -> str:
    """Why rows go through the trunk one at a time, or an empty string."""
    outcome, error = _tried(critic, trial.rows)
    if outcome is not None and outcome.agrees:
        return ""
    difference = error if outcome is None else f"hidden states differ by {outcome.difference:.1e} from those alone"
    return f"{critic.trunk.config.model_type} computes one rollout at a time: in padded rows, {difference}"


def _tried(critic: Critic, attempt: Callable[[], Result]) -> tuple[Result | None, str]:
    """What an attempt gave, or why it failed: an architecture's own code raises anything on what it does not expect."""
    try:
        return attempt(), ""
    except TreeUnsupportedError as error:
        reason = f"this architecture's attention uses {error}"
    except (CriticTrainError, Stopped):
        raise
    except Exception as error:
        if is_out_of_memory(error) or looks_lost(error):
            raise
        reason = f"this architecture's code fails on it ({type(error).__name__}: {first_line(error)})"
    if can_reset_after_error(critic.trunk):
        reset_after_error((critic.trunk, critic.head))
    return None, reason
