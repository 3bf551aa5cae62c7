"""A loss or gradient that is not finite: which micro-batch it came from, and whose rollouts those were."""

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
from critic_train.model.tensor_file import part_here
from critic_train.rollouts import Rollouts
from critic_train.stopping import StopRequest
from critic_train.training.train_step import LossRecipe, gradient_norm, gradient_pass, mini_batch_weights

SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergedRollouts:
    """The rollouts behind a mini-batch that is not finite.

    Attributes:
        places: int64 [m], their places in the mini-batch; those that are not finite by themselves first.
        finite: bool [m], whether the rollout's own loss is finite.
        what: how they were found, in words.
    """

    places: NDArray[np.int64]
    finite: NDArray[np.bool_]
    what: str


def find_diverged_rollouts(
    critic: Critic, rollouts: Rollouts, recipe: LossRecipe, compute: Compute, *, forest: bool
) -> DivergedRollouts:
    """Take the gradient of every micro-batch again, each by itself; the weights have not moved, so it is the same.

    This costs another step's computation, where a step was not finite. Steps that are pay nothing for it.

    Args:
        critic: on its device; its gradients are cleared before and after.
        rollouts: the mini-batch.
        recipe: the loss.
        compute: device, precision and token budget.
        forest: the layout of the step.
    """
    weights = mini_batch_weights(rollouts, recipe)
    parts = _parts(critic, rollouts, weights, recipe, compute, forest)
    bad = [places for places, finite in parts if not finite]
    sound_weights = _weights_are_finite(critic, compute)
    if not sound_weights:
        what = "the weights themselves are no longer finite: an earlier step ruined them"
    elif bad:
        what = f"{len(bad)} of its {len(parts)} micro-batches {'is' if len(bad) == 1 else 'are'} not finite alone"
    else:
        what = "each of its micro-batches is finite alone, only their sum is not"
    places = np.sort(np.concatenate(bad or [places for places, _ in parts]))
    finite = np.zeros(len(places), dtype=np.bool_)
    if sound_weights:
        for i in range(len(places)):
            alone = rollouts.take(places[i : i + 1])
            own = weights[rollouts.offsets[places[i]] : rollouts.offsets[places[i] + 1]]
            finite[i] = all(sound for _, sound in _parts(critic, alone, own, recipe, compute, forest))
    order = np.argsort(finite, kind="stable")
    return DivergedRollouts(places=places[order], finite=finite[order], what=what)


def save_diverged_rollouts(
    path: Path, rollouts: Rollouts, suspects: DivergedRollouts, found_at: list[Address], step: int
) -> str:
    """Keep the rollouts as a shard that every command reads, and put them into words.

    Args:
        path: the shard to write.
        rollouts: the mini-batch.
        suspects: which of them.
        found_at: where each came from, in the order of `suspects`.
        step: the step that was not taken.

    Returns:
        How they were found, how many they are, where they are kept, and the first few by address.
    """
    try:
        _write(path, rollouts.take(suspects.places), suspects, found_at, step)
        kept = f"kept in {path}"
    except OSError as error:  # a full disk must not hide what happened
        kept = f"not kept, for {path} cannot be written ({error.strerror or error})"
    alone = int((~suspects.finite).sum())
    count = "1 rollout" if len(found_at) == 1 else f"{len(found_at)} rollouts"
    first = f", the first {alone} not finite even by themselves" if 0 < alone < len(found_at) else ""
    shown = "\n".join(f"  {address}" for address in found_at[:SHOWN])
    more = f"\n  ... and {len(found_at) - SHOWN} more" if len(found_at) > SHOWN else ""
    return f"{suspects.what}: {count}{first}, {kept}\n{shown}{more}"


def _write(path: Path, kept: Rollouts, suspects: DivergedRollouts, found_at: list[Address], step: int) -> None:
    tokens = {"input_ids": kept.input_ids, "response_mask": kept.response_mask, "returns": kept.returns}
    if kept.values is not None:
        tokens["values"] = kept.values
    uids = [address.uid or f"group {key}" for address, key in zip(found_at, kept.group.tolist(), strict=True)]
    table = rollout_table(
        kept.offsets,
        tokens,
        {
            "uid": uids,
            "step": [step] * len(kept),
            "file": [address.file for address in found_at],
            "row_group": [address.row_group for address in found_at],
            "row": [address.row for address in found_at],
            "finite": suspects.finite.tolist(),
        },
    )
    with ShardFile(path, table.schema) as file:
        file.write_row_group(table)


def diverged(what: str) -> DivergedError:
    """The fault of a run whose numbers stopped being finite."""
    return DivergedError(
        f"training diverged: {what}",
        hint="the last checkpoint stands; a lower --lr, more --warmup-steps or --precision fp32 may help, with "
        "another --out. --on-non-finite skip goes on without such steps",
    )


def _weights_are_finite(critic: Critic, compute: Compute) -> bool:
    """Whether all weights are, each rank looking at its own part."""
    bad = sum(int((~torch.isfinite(part_here(p))).sum()) for p in critic.parameters())
    return float(compute.ranks.all_reduce_sum(torch.tensor([float(bad)]))) == 0.0


def _parts(
    critic: Critic, rollouts: Rollouts, weights: NDArray[np.float32], recipe: LossRecipe, compute: Compute, forest: bool
) -> list[tuple[NDArray[np.int64], bool]]:
    """(rollouts, whether the loss and the gradient's norm are finite) of each micro-batch by itself."""
    owners = np.repeat(np.arange(len(rollouts)), rollouts.lengths)

    found: list[tuple[NDArray[np.int64], bool]] = []

    def look(tokens: NDArray[np.int64], loss: torch.Tensor) -> None:
        # Of several ranks each has its own rollouts at this moment; what they find is found by all.
        mine = torch.zeros(len(rollouts))
        mine[torch.from_numpy(owners[tokens])] = 1.0
        losses = compute.ranks.all_reduce_sum(loss.reshape(1).cpu())
        finite = math.isfinite(float(losses)) and math.isfinite(gradient_norm(critic))
        found.append((np.flatnonzero(compute.ranks.all_reduce_sum(mine).numpy()), finite))
        critic.zero_grad(set_to_none=True)

    for attempt in attempts(critic, rollouts, compute):
        with attempt:
            found.clear()
            critic.zero_grad(set_to_none=True)
            never = StopRequest()
            gradient_pass(critic, rollouts, recipe, compute, weights, forest=forest, stop=never, after_each=look)
            return found
    raise AssertionError("attempts end by an error")
