"""Passes that begin again with fewer tokens at once where memory runs out.

A pass over rollouts is a loop that is left by `return`:

    for attempt in attempts(critic, rollouts, compute):
        with attempt:
            return gradient_pass(critic, rollouts, compute)

On one process, `compute.max_tokens` is halved for the next attempt, and stays lower. Of several ranks, those that did
not run out hang in a collective by then: the run ends with a checkpoint of the last whole step, and the same command
begins with the lower budget (see `Ranks.end_out_of_memory`).
"""

import gc
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import nn

from critic_train.distributed.ranks import Ranks
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.fsdp import can_reset_after_error, reset_after_error
from critic_train.rollouts import Rollouts
from critic_train.text import format_bytes


class Attempt:
    """One attempt at a pass. Its `with` block suppresses the error that says that memory ran out, and no other.

    Outside of the block the traceback no longer holds what was allocated.

    Attributes:
        error: the message of the error, once memory ran out.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.error = ""

    def __enter__(self) -> None:
        self._ranks.begin_attempt()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or not (is_out_of_memory(error) or self._ranks.reported_out_of_memory(error)):
            return False
        self.error = str(error) or type(error).__name__
        return True


def attempts(critic: Critic, rollouts: Rollouts, compute: Compute) -> Iterator[Attempt]:
    """Attempts at a pass over some rollouts, each with a smaller `compute.max_tokens` than the one before.

    Of several ranks all make the attempts together, and end each with a collective.

    Args:
        critic: its gradients are cleared before another attempt.
        rollouts: what the pass goes through.
        compute: its `max_tokens` is halved for good, down to the longest rollout.

    Raises:
        MachineError: a single rollout is too much; or memory ran out on one of several ranks.
    """
    while True:
        attempt = Attempt(compute.ranks)
        yield attempt
        lowered = _lowered(rollouts, compute, critic, attempt.error)
        critic.zero_grad(set_to_none=True)  # of weights that are gathered, too
        reset_after_error(critic.parts)
        critic.zero_grad(set_to_none=True)
        release_memory(compute.device)
        compute.max_tokens = lowered


def _lowered(rollouts: Rollouts, compute: Compute, critic: Critic, error: str) -> int:
    """The next token budget after memory ran out; ends the run where there is none, or other ranks hang."""
    ranks, tokens = compute.ranks, len(rollouts.input_ids)
    longest = -(-int(rollouts.lengths.max()) // compute.sequence_size)  # on each of the ranks that compute it
    if min(compute.max_tokens, tokens) <= longest:
        release_memory(compute.device)
        ranks.end_out_of_memory(
            _single_rollout_message(longest, critic, compute),
            error.strip()[:200],
            hint="--activation-checkpointing layer, --precision bf16, a smaller model, "
            f"{_more_sequence_ranks(compute)}, or leave such rollouts out",
            next_start={},
        )
    lowered = max(longest, min(compute.max_tokens, -(-tokens // ranks.size)) // 2)
    if ranks.size > 1 or not can_reset_after_error(critic.trunk):
        release_memory(compute.device)
        ranks.end_out_of_memory(
            f"memory ran out with {compute.max_tokens:,} tokens at once",
            error.strip()[:200],
            hint=f"--max-tokens {lowered} needs less; the result is the same",
            next_start={"max_tokens": lowered},
        )
    return lowered


def _more_sequence_ranks(compute: Compute) -> str:
    """The next larger --sequence-parallel that this run could have, or with more ranks."""
    size, number = compute.ranks.size, compute.sequence_size
    larger = next((n for n in range(number + 1, size + 1) if size % n == 0), None)
    if larger is not None:
        return f"--sequence-parallel {larger} to cut it over {larger} ranks"
    return f"{2 * size} ranks with --sequence-parallel {2 * number} to cut it over them"


def release_memory(device: torch.device) -> None:
    """Give back what an attempt that ran out has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def activation_bytes(trunk: nn.Module, tokens: int, compute: Compute) -> int:
    """About what the backward pass of a gated decoder keeps of some tokens, without activation checkpointing.

    A layer keeps its residual stream twice in float32; and in the compute precision both normed states, queries, keys,
    values and the attention's output (about 6 hidden_size), and gate, up, activation and product of the MLP.
    """
    config: Any = trunk.config
    width = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", 4 * width))
    size = 2 if compute.precision == "bf16" else 4
    return tokens * int(config.num_hidden_layers) * (2 * 4 * width + size * (6 * width + 4 * inner))


def _single_rollout_message(tokens: int, critic: Critic, compute: Compute) -> str:
    parameters = sum(p.numel() for p in critic.parameters())
    static, activations = 16 * parameters // compute.ranks.size, activation_bytes(critic.trunk, tokens, compute)
    part = f" of {tokens:,} tokens"
    if compute.sequence is not None:
        part = f", {tokens:,} tokens of it on each of {compute.sequence_size} ranks"
    room = ""
    if compute.device.type == "cuda":
        room = f"; {compute.device} has {format_bytes(torch.cuda.mem_get_info(compute.device)[1])}"
    return (
        f"memory ran out on a single rollout{part}: weights, gradients and moments take about "
        f"{format_bytes(static)} and its activations {format_bytes(activations)}{room}"
    )
