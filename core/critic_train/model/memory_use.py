"""What passes of a critic hold at their peak, measured on a few random rollouts."""

import gc
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.microbatches import micro_batches
from critic_train.model.model_input import ModelInput
from critic_train.model.oom import release_memory
from critic_train.rollouts import Rollouts, rollouts_of_tokens

MEASURED_TOKENS = (1024, 3072)
"""Positions of the two passes whose peaks are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """What passes of a critic hold at their peak, in bytes of one device.

    Attributes:
        fixed: whatever the number of tokens: weights, gradients where it is trained, weights cast to bf16.
        per_token: for each position of a micro-batch.
        drawn: tokens of the largest pass, as `random_rollouts` counts them.
        positions: what was computed of them.
    """

    fixed: float
    per_token: float
    drawn: int = 0
    positions: int = 0

    def tokens(self, available: float) -> int:
        """The positions that so many bytes hold."""
        return max(0, int((available - self.fixed) / max(self.per_token, 1.0)))


def measure_memory(critic: Critic, compute: Compute, *, forest: bool, training: bool, beyond: int = 0) -> MemoryUse:
    """What a position costs, by the peaks of two passes over random rollouts. All ranks call it.

    Args:
        critic: on its device; gradients that it has are cleared.
        compute: of the job, on a CUDA device.
        forest: how rollouts are laid out.
        training: whether a backward pass follows; gradients are then there already, as in the second micro-batch of
            a step.
        beyond: both passes have so many tokens more than they would.
    """
    vocabulary = int(critic.trunk.config.vocab_size)
    few, many = (random_rollouts(beyond + tokens, vocabulary) for tokens in MEASURED_TOKENS)
    compute = replace(compute, max_tokens=10**9)  # each in one micro-batch
    if training:
        peak(critic, compute, few, forest=forest, training=True)
    (fewer, low), (more, high) = (
        peak(critic, compute, rollouts, forest=forest, training=training) for rollouts in (few, many)
    )
    critic.zero_grad(set_to_none=True)
    release_memory(compute.device)
    per_token = (high - low) / max(1, more - fewer)
    return MemoryUse(
        fixed=low - per_token * fewer, per_token=per_token, drawn=beyond + MEASURED_TOKENS[1], positions=more
    )


def measure_further(critic: Critic, compute: Compute, use: MemoryUse, tokens: int, *, forest: bool) -> MemoryUse:
    """The same by a pass that has nearly as many tokens as are to be computed at once. All ranks call it.

    With few positions the peak is in the forward pass, beside the weights that are cast to bf16 there; with many it is
    in the backward pass, where a position takes up to a third more.

    Args:
        critic: on its device; gradients that it has are cleared.
        compute: of the run, on a CUDA device.
        use: by two passes of few tokens.
        tokens: positions of the further pass.
        forest: how rollouts are laid out.

    Returns:
        The line from the largest pass of `use` to the further one; `use` where that has hardly more tokens.
    """
    drawn = int(tokens * use.drawn / max(1, use.positions))
    if drawn < 2 * use.drawn:
        return use
    vocabulary = int(critic.trunk.config.vocab_size)
    compute = replace(compute, max_tokens=10**9)
    few, many = (random_rollouts(number, vocabulary) for number in (MEASURED_TOKENS[0], drawn))
    peak(critic, compute, few, forest=forest, training=True)  # gradients are there from here on
    more, high = peak(critic, compute, many, forest=forest, training=True)
    critic.zero_grad(set_to_none=True)
    release_memory(compute.device)
    low = use.fixed + use.per_token * use.positions
    per_token = (high - low) / max(1, more - use.positions)
    return MemoryUse(fixed=high - per_token * more, per_token=per_token, drawn=drawn, positions=more)


def peak(critic: Critic, compute: Compute, rollouts: Rollouts, *, forest: bool, training: bool) -> tuple[int, int]:
    """(positions, bytes at the peak) of the largest micro-batch of some rollouts."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(compute.device)
    positions = 0
    for batch in micro_batches(rollouts, compute, forest=forest):
        with torch.set_grad_enabled(training), compute.autocast():
            loss = some_loss(critic, batch)
        if training:
            loss.backward()
        positions = max(positions, batch.computed_tokens)
    return positions, torch.cuda.max_memory_allocated(compute.device)


def some_loss(critic: Critic, batch: ModelInput) -> Tensor:
    """A number that depends on all that a step's loss depends on, the next-token head included."""
    if critic.next_token_head is None:
        loss: Tensor = critic(batch).sum()
        return loss
    states, state_index = critic.hidden(batch), batch.value_index_on_host
    labels, weights = np.zeros_like(state_index), np.ones(len(state_index), dtype=np.float32)
    next_token: Tensor = critic.next_token_head(states, state_index, labels, weights)
    return critic.values(states, batch).sum() + next_token


def random_rollouts(tokens: int, vocabulary: int) -> Rollouts:
    """Four rollouts of one prompt, half of `tokens` positions in it and the rest in their responses."""
    prompt, response, count = tokens // 2, tokens // 8, 4
    rng = np.random.default_rng(0)
    first = rng.integers(0, vocabulary, prompt)
    sequences = [np.concatenate([first, rng.integers(0, vocabulary, response)]) for _ in range(count)]
    return rollouts_of_tokens(sequences, [prompt] * count)
