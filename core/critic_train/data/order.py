"""The validation split and the order of training: pure functions of seed, epoch and group keys."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochPlan:
    """The order of one epoch.

    Attributes:
        order: int64 [n], a permutation of the rollouts; those of one prompt group stand together.
        bounds: int64 [m+1]; mini-batch b is order[bounds[b]:bounds[b+1]].
    """

    order: NDArray[np.int64]
    bounds: NDArray[np.int64]


def connected_groups(groups: NDArray[np.int64], prompts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Keys of the groups that a split must keep on one side: connected components of groups that share a prompt.

    A dump of several epochs samples a prompt again under another uid; split by uid alone, it would be on both sides.

    Args:
        groups: int64 [n], the prompt group of every rollout.
        prompts: int64 [n], a key of its prompt's tokens.

    Returns:
        int64 [n], the smallest key among the connected groups; a group that shares no prompt has its own.
    """
    smallest, group = np.unique(groups, return_inverse=True)
    prompt = np.unique(prompts, return_inverse=True)[1]
    while True:
        smallest_of_prompt = np.full(len(prompt), np.iinfo(np.int64).max)
        np.minimum.at(smallest_of_prompt, prompt, smallest[group])
        joined = smallest.copy()
        np.minimum.at(joined, group, smallest_of_prompt[prompt])
        if np.array_equal(joined, smallest):
            return smallest[group]
        smallest = joined


def split_groups(groups: NDArray[np.int64], fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hold out a share of the prompt groups, so that no prompt is on both sides.

    Groups are ranked by a hash of (seed, key): neither the order of the files nor the other groups' rollouts move a
    group across, and adding groups moves only those at the edge.

    Args:
        groups: int64 [n], what must stay together, of every rollout: see `connected_groups`.
        fraction: share of the groups to hold out, in [0, 1).
        seed: of the split.

    Returns:
        (int64 kept, int64 held out), ascending positions. One group at least is held out when fraction > 0 and there
        are two or more, and one at least is kept.
    """
    keys, inverse = np.unique(groups, return_inverse=True)
    count = round(fraction * len(keys))
    if fraction > 0:
        count = min(max(count, 1), len(keys) - 1)
    ranked = np.argsort(mixed(keys, seed), kind="stable")
    held = np.zeros(len(keys), dtype=np.bool_)
    held[ranked[:count]] = True
    return np.flatnonzero(~held[inverse]), np.flatnonzero(held[inverse])


def epoch_plan(groups: NDArray[np.int64], *, batch_size: int, seed: int, epoch: int) -> EpochPlan:
    """Shuffle the prompt groups of an epoch and cut them into mini-batches of whole groups.

    Args:
        groups: int64 [n], the prompt group of every rollout.
        batch_size: the most rollouts a mini-batch may have. A larger group is cut into pieces of this size.
        seed: of the run.
        epoch: 0 for the first. The generator is made from (seed, epoch) alone; no global state is read or moved.

    Returns:
        The order and the bounds of its mini-batches; nothing is dropped.
    """
    keys, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    shuffle = _shuffle(len(keys), seed, epoch)
    rank = np.empty(len(keys), dtype=np.int64)
    rank[shuffle] = np.arange(len(keys))
    order = np.argsort(rank[inverse], kind="stable")
    bounds = _bounds(sizes[shuffle].tolist(), batch_size)
    return EpochPlan(order=order.astype(np.int64), bounds=np.asarray(bounds, dtype=np.int64))


def steps_of_epoch(sizes: NDArray[np.int64], *, batch_size: int, seed: int, epoch: int) -> int:
    """How many mini-batches `epoch_plan` cuts an epoch into, without making it.

    Args:
        sizes: int64 [g], rollouts of each prompt group, by ascending key.
        batch_size: see `epoch_plan`.
        seed: see `epoch_plan`.
        epoch: see `epoch_plan`.
    """
    largest = int(sizes.max(initial=0))
    if int(sizes.sum()) <= batch_size:
        return int(len(sizes) > 0)
    if largest == sizes.min() and largest <= batch_size:
        return -(-len(sizes) // (batch_size // largest))
    return len(_bounds(sizes[_shuffle(len(sizes), seed, epoch)].tolist(), batch_size)) - 1


def _shuffle(groups: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """int64 [groups]: a permutation that is a function of its arguments."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch)))).permutation(groups)


def _bounds(sizes: list[int], batch_size: int) -> list[int]:
    """Where mini-batches begin and end, in rollouts, for groups of these sizes in this order.

    Cuts are allowed between groups, and every batch_size rollouts inside one that is larger than a mini-batch.
    """
    bounds = [0]
    filled = 0
    for size in sizes:
        if filled and filled + size > batch_size:
            bounds.append(bounds[-1] + filled)
            filled = 0
        while size > batch_size:
            bounds.append(bounds[-1] + batch_size)
            size -= batch_size
        filled += size
    if filled:
        bounds.append(bounds[-1] + filled)
    return bounds


def mixed(keys: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """A well-spread 64-bit hash of (seed, key): the finaliser of SplitMix64 (Steele, Lea & Flood 2014)."""
    with np.errstate(over="ignore"):
        z = keys.view(np.uint64) + np.uint64(seed % 2**64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
