"""A loss or gradient that is not finite: which micro-batch it came from, and which rollouts were in it."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from critic_train.data.addresses import Address
from critic_train.data.writing import ShardFile, rollout_table
from critic_train.errors import DivergedError
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.oom import attempts
from critic_train.model_files.tensor_file import part_here
from critic_train.rollouts import Rollouts
from critic_train.stopping import StopRequest
from critic_train.training.train_step import LossRecipe, clip_gradient, gradient_pass, mini_batch_weights

SHOWN = 10
"""Rollouts that a message names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergedRollouts:
    """The rollouts behind a mini-batch that is not finite.

    Attributes:
        index: int64 [m], their indices in the mini-batch; those that are not finite by themselves first.
        finite: bool [m], whether the rollout's own loss is finite.
        reason: which computation was not finite, for a person.
    """

    index: NDArray[np.int64]
    finite: NDArray[np.bool_]
    reason: str


def find_diverged_rollouts(
    critic: Critic, rollouts: Rollouts, recipe: LossRecipe, compute: Compute, *, forest: bool, steps_taken: int
) -> DivergedRollouts:
    """Take the gradient of every micro-batch again, each by itself; the weights have not moved, so it is the same.

    This costs another step's computation, where a step was not finite. Steps that are pay nothing for it.

    Args:
        critic: on its device; its gradients are cleared before and after.
        rollouts: the mini-batch.
        recipe: the loss.
        compute: device, precision and token budget.
        forest: the layout of the step.
        steps_taken: optimizer steps that have moved the weights so far.
    """
    weights = mini_batch_weights(rollouts, recipe)
    parts = _parts(critic, rollouts, weights, recipe, compute, forest)
    bad = [index for index, finite in parts if not finite]
    weights_finite = _weights_are_finite(critic, compute)
    if not weights_finite:
        by_step = "are no longer finite: an earlier step ruined them"
        reason = f"the weights themselves {by_step if steps_taken else 'are not finite, before any step was taken'}"
    elif bad:
        reason = f"{len(bad)} of its {len(parts)} micro-batches {'is' if len(bad) == 1 else 'are'} not finite alone"
    else:
        reason = "each of its micro-batches is finite alone, only their sum is not"
    index = np.sort(np.concatenate(bad or [index for index, _ in parts]))
    finite = np.zeros(len(index), dtype=np.bool_)
    if weights_finite:
        for i, rollout in enumerate(index.tolist()):
            alone = rollouts.take(index[i : i + 1])
            own = weights[rollouts.offsets[rollout] : rollouts.offsets[rollout + 1]]
            finite[i] = all(sound for _, sound in _parts(critic, alone, own, recipe, compute, forest))
    order = np.argsort(finite, kind="stable")
    return DivergedRollouts(index=index[order], finite=finite[order], reason=reason)


def save_diverged_rollouts(
    path: Path, rollouts: Rollouts, suspects: DivergedRollouts, sources: list[Address], step: int
) -> str:
    """Save the rollouts as a shard that every command reads, and describe them.

    Args:
        path: the shard to write.
        rollouts: the mini-batch.
        suspects: which of them.
        sources: the address of each in the data set, in the order of `suspects`.
        step: the step that was not taken.

    Returns:
        For a person: the reason, their number, where they were saved, and the addresses of the first few.
    """
    try:
        _write(path, rollouts.take(suspects.index), suspects, sources, step)
        saved = f"kept in {path}"
    except OSError as error:  # a full disk must not hide what happened
        saved = f"not kept, for {path} cannot be written ({error.strerror or error})"
    alone = int((~suspects.finite).sum())
    count = "1 rollout" if len(sources) == 1 else f"{len(sources)} rollouts"
    first = f", the first {alone} not finite even by themselves" if 0 < alone < len(sources) else ""
    shown = "\n".join(f"  {address}" for address in sources[:SHOWN])
    more = f"\n  ... and {len(sources) - SHOWN} more" if len(sources) > SHOWN else ""
    return f"{suspects.reason}: {count}{first}, {saved}\n{shown}{more}"


def _write(path: Path, rollouts: Rollouts, suspects: DivergedRollouts, sources: list[Address], step: int) -> None:
    tokens = {"input_ids": rollouts.input_ids, "response_mask": rollouts.response_mask, "returns": rollouts.returns}
    if rollouts.values is not None:
        tokens["values"] = rollouts.values
    uids = [address.uid or f"group {key}" for address, key in zip(sources, rollouts.group.tolist(), strict=True)]
    table = rollout_table(
        rollouts.offsets,
        tokens,
        {
            "uid": uids,
            "step": [step] * len(rollouts),
            "file": [address.file for address in sources],
            "row_group": [address.row_group for address in sources],
            "row": [address.row for address in sources],
            "finite": suspects.finite.tolist(),
        },
    )
    with ShardFile(path, table.schema) as file:
        file.write_row_group(table)


def diverged(what: str, *, steps_taken: int) -> DivergedError:
    """The error of a run whose loss, gradient or values are not finite.

    Args:
        what: happened.
        steps_taken: optimizer steps that have moved the weights so far.
    """
    if steps_taken == 0:
        return DivergedError(
            f"training cannot begin: {what}",
            hint="critic-train verify looks through the model's weights, critic-train check through the rollouts; "
            "--precision fp32 may help, and --on-non-finite skip leaves a step out whose rollouts are the cause",
        )
    return DivergedError(
        f"training diverged: {what}",
        hint="checkpoints that were written are intact; a lower --lr, more --warmup-steps or --precision fp32 may "
        "help, with another --out. --on-non-finite skip goes on without such steps",
    )


def _weights_are_finite(critic: Critic, compute: Compute) -> bool:
    """Whether all weights are finite; each rank checks its own shards."""
    bad = sum(int((~torch.isfinite(part_here(p))).sum()) for p in critic.parameters())
    return float(compute.ranks.all_reduce_sum(torch.tensor([float(bad)]))) == 0.0


def _parts(
    critic: Critic, rollouts: Rollouts, weights: NDArray[np.float32], recipe: LossRecipe, compute: Compute, forest: bool
) -> list[tuple[NDArray[np.int64], bool]]:
    """Of each micro-batch by itself: int64 indices of its rollouts, and whether its loss and gradient are finite."""
    owners = np.repeat(np.arange(len(rollouts)), rollouts.lengths)

    parts: list[tuple[NDArray[np.int64], bool]] = []

    def check(tokens: NDArray[np.int64], loss: torch.Tensor) -> None:
        # Each rank has other rollouts in this micro-batch; losses and indices are those of all ranks together.
        mine = torch.zeros(len(rollouts))
        mine[torch.from_numpy(owners[tokens])] = 1.0
        losses = compute.ranks.all_reduce_sum(loss.reshape(1).cpu())
        finite = math.isfinite(float(losses)) and math.isfinite(clip_gradient(critic, grad_clip=0))
        parts.append((np.flatnonzero(compute.ranks.all_reduce_sum(mine).numpy()), finite))
        critic.zero_grad(set_to_none=True)

    for attempt in attempts(critic, rollouts, compute):
        with attempt:
            parts.clear()
            critic.zero_grad(set_to_none=True)
            never = StopRequest()
            gradient_pass(critic, rollouts, recipe, compute, weights, forest=forest, stop=never, after_each=check)
            return parts
    raise AssertionError("attempts end by an error")
