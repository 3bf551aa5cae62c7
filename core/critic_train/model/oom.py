"""Passes that begin again with fewer tokens at once where memory runs out.

A pass over rollouts is a loop that is left by `return`:

    for attempt in attempts(critic, rollouts, compute):
        with attempt:
            return gradient_pass(critic, rollouts, compute)

On one process, `compute.max_tokens` is halved for the next attempt, and stays lower; where a single rollout is too
much, less is kept for the backward pass (layer inputs, tiles), if that chooses itself. Of several ranks, those that did
not run out hang in a collective by then: the run ends with a checkpoint of the last whole step, and the same command
begins with the lower budget (see `Ranks.end_out_of_memory`).
"""

import contextlib
import gc
import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import nn

from critic_train.distributed.ranks import Ranks
from critic_train.errors import ModelError
from critic_train.layers.sequence_parallel import HeadShares
from critic_train.model.compute import Compute, Keeping
from critic_train.model.critic import Critic
from critic_train.model.fsdp import can_reset_after_error, reset_after_error
from critic_train.model.memory import set_keeping
from critic_train.model_files.config import config_size, head_size
from critic_train.rollouts import Rollouts
from critic_train.settings import KEEPS_LAYER_INPUTS
from critic_train.text import format_bytes

MOST_SEQUENCE_RANKS = 64
"""The most that a message proposes."""


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
        compute: its `max_tokens` is halved for good, down to the longest rollout; then less is kept for the backward
            pass, as far as `keep_less` goes.

    Raises:
        MachineError: a single rollout is too much; or memory ran out on one of several ranks.
    """
    while True:
        attempt = Attempt(compute.ranks)
        yield attempt
        lowered = _lowered(rollouts, compute, critic, attempt.error)  # 0 where less is kept instead
        critic.zero_grad(set_to_none=True)  # of weights that are gathered, too
        reset_after_error(critic.parts)
        critic.zero_grad(set_to_none=True)
        release_memory(compute.device)
        if lowered:
            compute.max_tokens = lowered
        else:
            _keep_less(critic, compute)


def _keep_less(critic: Critic, compute: Compute) -> None:
    """Have the next attempt keep less for its backward pass."""
    keeping, *rest = compute.keep_less
    compute.keep_less = tuple(rest)
    with contextlib.suppress(ModelError):  # no part of it can be computed in tiles: what was set stays
        set_keeping(critic, compute, keeping)
        compute.kept_less = True


def _lowered(rollouts: Rollouts, compute: Compute, critic: Critic, error: str) -> int:
    """The next token budget after memory ran out; ends the run where there is none, or other ranks hang."""
    ranks, tokens = compute.ranks, len(rollouts.input_ids)
    longest = -(-int(rollouts.lengths.max()) // compute.sequence_size)  # on each of the ranks that compute it
    if min(compute.max_tokens, tokens) <= longest:
        if compute.keep_less and torch.is_grad_enabled() and can_reset_after_error(critic.trunk):
            return 0
        release_memory(compute.device)
        ranks.end_out_of_memory(
            _single_rollout_message(longest, critic, compute),
            error.strip()[:200],
            hint=_single_rollout_hint(longest, critic, compute),
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


def release_memory(device: torch.device) -> None:
    """Give back what an attempt that ran out has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def activation_bytes(
    trunk: nn.Module, tokens: int, compute: Compute, keeping: Keeping | None = None, sequence_size: int | None = None
) -> int:
    """About what the forward pass of a gated decoder keeps of some tokens, and a layer's backward pass adds to it.

    A layer keeps its residual stream twice in float32, and both normed states before they meet their weights; and in
    the compute precision both normed states, queries, keys, values and the attention's output, which is there twice
    where positions are cut over ranks (by head, and by position), and gate, up, activation and product of the MLP. In
    tiles, the inputs of norms and MLP remain of these. The backward pass of one layer at a time has the gradients of
    its input and output, and of two of the MLP's inner states.

    Args:
        trunk: its sizes are read.
        tokens: positions of a micro-batch, on this rank.
        compute: its precision.
        keeping: what is kept; None as `compute` has it.
        sequence_size: how many ranks cut the micro-batch among them; None as `compute` has it.
    """
    keeping = keeping or compute.keeping
    config: Any = trunk.config
    width, layers = int(config.hidden_size), int(config.num_hidden_layers)
    inner = config_size(config, "intermediate_size") or 4 * width
    sequence_size = sequence_size or compute.sequence_size
    attention = head_size(config) * sum(attention_heads(config, sequence_size))
    if sequence_size > 1:
        attention += head_size(config) * attention_heads(config, 1)[-1]
    size = 2 if compute.precision == "bf16" else 4
    layer = 4 * 4 * width + size * (2 * width + attention + 4 * inner)
    gradients = 2 * 4 * width + (0 if keeping.kind.endswith("tiles") else size * 2 * inner)
    if keeping.kind.endswith("tiles"):
        layer = 3 * 4 * width + size * (width + attention)
    elif keeping.kind == "selective":
        layer = 2 * 4 * width + size * (3 * width + 2 * inner)
    if keeping.kind not in KEEPS_LAYER_INPUTS:
        return tokens * (layers * layer + gradients)
    return tokens * (4 * width * (2 if keeping.on_host else layers) + layer + gradients)


def attention_heads(config: Any, sequence_size: int) -> tuple[int, int, int, int]:
    """Heads of queries, keys, values and output that a layer computes on all ranks together.

    Cut over ranks, copies and heads of zeros are among them. An architecture that does not say is taken to have as many
    of each.
    """
    heads = config_size(config, "num_attention_heads") or 1
    kv_heads = config_size(config, "num_key_value_heads") or heads
    if sequence_size > 1 and heads % kv_heads == 0:
        shares = HeadShares(heads, kv_heads, sequence_size)
        heads, kv_heads = shares.computed, shares.computed_keys
    return heads, kv_heads, kv_heads, heads


def _more_sequence_ranks(critic: Critic, tokens: int, compute: Compute) -> str:
    """The --sequence-parallel under which a rollout would about fit, for this run's ranks if they can be cut so."""
    activations = activation_bytes(critic.trunk, tokens, compute)
    room = _device_bytes(compute) - _static_bytes(critic, compute)
    times = 2
    while times < MOST_SEQUENCE_RANKS and activations / times > max(room, 0):
        times *= 2
    size, number = compute.ranks.size, times * compute.sequence_size
    divisor = next((n for n in range(number, size + 1) if size % n == 0), None)
    if divisor is not None:
        return f"--sequence-parallel {divisor} to cut it over {divisor} ranks"
    return f"{max(number, 2 * size)} ranks with --sequence-parallel {number} to cut it over them"


def _static_bytes(critic: Critic, compute: Compute) -> int:
    """Weights, gradients and moments of a rank, in float32, and the average of its weights where there is one."""
    each = 20 if compute.averages_weights else 16
    return each * sum(p.numel() for p in critic.parameters()) // compute.ranks.size


def _device_bytes(compute: Compute) -> int:
    """Memory of the device."""
    if compute.device.type == "cuda":
        return int(torch.cuda.mem_get_info(compute.device)[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // compute.ranks.size


def _single_rollout_hint(tokens: int, critic: Critic, compute: Compute) -> str:
    ways = []
    if torch.is_grad_enabled() and compute.keeping.kind != "layer-tiles":
        ways.append("--activation-checkpointing layer-tiles")
    if compute.precision != "bf16":
        ways.append("--precision bf16")
    ways += [_more_sequence_ranks(critic, tokens, compute), "a smaller model, or a lower --max-length"]
    return ", ".join(ways)


def _single_rollout_message(tokens: int, critic: Critic, compute: Compute) -> str:
    static, activations = _static_bytes(critic, compute), activation_bytes(critic.trunk, tokens, compute)
    room = f"; {compute.device} has {format_bytes(_device_bytes(compute))}" if compute.device.type == "cuda" else ""
    part = f" of {tokens:,} tokens"
    if compute.sequence is not None:
        part = f", {tokens:,} tokens of it on each of {compute.sequence_size} ranks"
    return (
        f"memory ran out on a single rollout{part}: weights, gradients and moments take about "
        f"{format_bytes(static)} and its activations {format_bytes(activations)} "
        f"(--activation-checkpointing {compute.keeping}){room}"
    )
