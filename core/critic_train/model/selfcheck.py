"""Prove on the data at hand that a rollout in a forest is computed as the rollout alone would be.

Stock attention goes wrong silently when prefixes are shared (differences of 4 where 1e-6 is right were measured),
and some architectures cannot share at all: recurrent state, attention arithmetic of their own. So before a trunk is
trusted with a forest, a few rollouts go through it both ways.
"""

import contextlib
from dataclasses import dataclass, replace

import numpy as np
import torch

from critic_train.errors import MachineError, ModelError
from critic_train.model.attention import NAME, TreeUnsupportedError, choose_attention
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.fsdp import can_reset_after_error, full_precision_params, reset_after_error
from critic_train.model.last_layer import narrow_last_layer, widen_last_layer
from critic_train.model.model_input import forest_input
from critic_train.model.oom import Attempt, release_memory
from critic_train.model.prefix_tree import build_prefix_trees, prefix_order
from critic_train.rollouts import Rollouts
from critic_train.settings import ComputeSettings, Packing

STOCK_ATTENTION = ("sdpa", "eager")
"""Tried in this order."""
TOLERANCE = 1e-3
"""Largest difference of a hidden state allowed, relative to the largest hidden state. Right is about 1e-6."""

SAMPLED_ROLLOUTS = 4
"""Rollouts that stand together in a sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingChoice:
    """How rollouts will be laid out, and why where that is not a forest.

    Attributes:
        forest: whether micro-batches are forests.
        difference: the largest relative difference seen between a forest and rollouts alone; None if not measured.
        reason: why the trunk gets padded rows, or an empty string.
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
        forest = build_prefix_trees(rollouts, prefix_order(rollouts))
        compute.attention, passed = choose_attention(settings.attention, forest, compute.device, compute.precision)
        messages = messages + passed
    return choice, messages


def choose_packing(critic: Critic, rollouts: Rollouts, packing: Packing) -> PackingChoice:
    """Decide between a forest and padded rows, and set the trunk's attention accordingly.

    Args:
        critic: on its device.
        rollouts: a few to try, some that share a prompt and the longest among them.
        packing: what the user asked for; "forest" refuses where "auto" falls back.

    Raises:
        ModelError: the trunk looks ahead (it is no causal decoder), or "forest" was asked for and is wrong here.
    """
    sample = _with_branch(rollouts)
    widen_last_layer(critic.trunk)
    use_stock_attention(critic)
    alone = _alone(critic, sample)
    _refuse_look_ahead(critic, sample, alone)
    if packing == "rows":
        return PackingChoice(forest=False)
    difference: float | None = None
    try:
        critic.trunk.set_attn_implementation(NAME)
        difference = _difference(critic, sample, alone)
    except TreeUnsupportedError as error:
        reason = f"this architecture's attention uses {error}"
    except (TypeError, ValueError):
        reason = "this architecture takes no attention but its own"
    else:
        reason = "" if difference <= TOLERANCE else f"hidden states differ by {difference:.1e} from rollouts run alone"
    if not reason:
        if narrow_last_layer(critic.trunk) and _difference(critic, sample, alone) > TOLERANCE:
            widen_last_layer(critic.trunk)
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
    """Give the trunk back the attention of transformers, for rows."""
    trunk = critic.trunk
    for name in STOCK_ATTENTION:
        # An architecture that does not know a name raises, or keeps what it had without a word.
        with contextlib.suppress(ValueError):
            trunk.set_attn_implementation(name)
        if trunk.config._attn_implementation == name:
            return
    # What knows no names at all still reads this one when it builds its mask.
    trunk.config._attn_implementation = "eager"


def _with_branch(sample: Rollouts) -> Rollouts:
    """The sample and one rollout more, which leaves the first one in the middle of its response."""
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
def _alone(critic: Critic, sample: Rollouts) -> torch.Tensor:
    """[T, hidden]: every rollout through the trunk on its own, with stock attention, in float32."""
    rows = []
    for start, stop in zip(sample.offsets[:-1].tolist(), sample.offsets[1:].tolist(), strict=True):
        ids = torch.from_numpy(sample.input_ids[start:stop].astype(np.int64)).to(critic.device)
        rows.append(critic.trunk(input_ids=ids[None], use_cache=False).last_hidden_state[0])
    return torch.cat(rows)


@torch.no_grad()
def _difference(critic: Critic, sample: Rollouts, alone: torch.Tensor) -> float:
    """The largest difference of a state that is read between the sample as one forest and its rollouts alone."""
    batch = forest_input(sample, prefix_order(sample), alone.device)
    expected = alone[torch.from_numpy(batch.tokens - 1).to(alone.device)]
    return float((critic.hidden(batch)[batch.pair] - expected).abs().max() / alone.abs().max())


def _refuse_look_ahead(critic: Critic, sample: Rollouts, alone: torch.Tensor) -> None:
    length = int(sample.offsets[1])
    half = max(1, length // 2)
    ids = torch.from_numpy(sample.input_ids[:half].astype(np.int64)).to(alone.device)
    with torch.no_grad():
        seen = critic.trunk(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    if float((seen - alone[:half]).abs().max() / alone.abs().max()) > TOLERANCE:
        raise ModelError(
            f"{critic.trunk.config.model_type} looks ahead: a state depends on tokens after it",
            hint="a critic must be a causal decoder",
        )
