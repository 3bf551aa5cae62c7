"""Cut a mini-batch into micro-batches of at most `max_tokens` computed tokens.

Values of whole rollouts, without gradients: for evaluation and for fresh old values.
"""

from bisect import bisect_left, insort
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig

from critic_train.events import Event, Progress
from critic_train.layers.prefix_tree import PrefixOrder, prefix_order
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.fsdp import reshard
from critic_train.model.model_input import ModelInput, empty_input, padded_input, tree_input
from critic_train.model.oom import attempts
from critic_train.model.tree_cuts import tree_pieces
from critic_train.model.work_sharing import Cost, Pieces, shares
from critic_train.prefetch import ahead
from critic_train.rollouts import Rollouts, offsets_from_lengths
from critic_train.stopping import Stopped, StopRequest

AHEAD = 2
"""Micro-batches laid out while the device computes."""


def micro_batches(rollouts: Rollouts, compute: Compute, *, forest: bool) -> Iterator[ModelInput]:
    """The micro-batches of a mini-batch, laid out on the device.

    A GPU does not wait for them: they are laid out in a thread beside it. On a CPU they are laid out one at a time:
    the model has every core, and a thread would only take from it.

    Of several ranks each gets its own share, in as many micro-batches as the others: layers are gathered in step.

    Args:
        rollouts: the mini-batch, the same on all ranks.
        compute: device, token budget and ranks.
        forest: as a forest, or as padded rows.
    """
    batches = _laid_out(rollouts, compute, forest=forest)
    return ahead(batches, AHEAD) if compute.device.type == "cuda" else batches


def _laid_out(rollouts: Rollouts, compute: Compute, *, forest: bool) -> Iterator[ModelInput]:
    for batch in _layouts(rollouts, compute, forest=forest):
        yield batch if compute.states is None else compute.states.add_to(batch, rollouts)


def _layouts(rollouts: Rollouts, compute: Compute, *, forest: bool) -> Iterator[ModelInput]:
    if compute.ranks.size > 1:
        for part in shared_micro_batches(rollouts, compute, forest=forest):
            if not len(part):
                yield empty_input(rollouts, compute.device, forest=forest, sequence=compute.sequence)
            elif forest:
                yield tree_input(rollouts, part, compute.device, compute.attention, compute.sequence)
            else:
                yield padded_input(rollouts, part.index, compute.device, masked=not compute.one_row)
        return
    for members in same_frequencies(rollouts.lengths, compute.frequency_limit):
        if forest:
            for order in forest_micro_batches(
                rollouts, compute.max_tokens, members, cut_as_they_come=compute.cut_as_they_come
            ):
                yield tree_input(rollouts, order, compute.device, compute.attention)
        else:
            for index in row_micro_batches(rollouts, 1 if compute.one_row else compute.max_tokens, members):
                yield padded_input(rollouts, index, compute.device, masked=not compute.one_row)


def frequency_limit(config: PreTrainedConfig) -> int | None:
    """The length beyond which a rollout has other rotary frequencies; None where all have the same.

    With rope_type "longrope" (Phi-3.5, Phi-4-mini) transformers takes one of two lists for all rows of a batch, by the
    longest of them.
    """
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    by_kind = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    limits = [
        part.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for part in by_kind
        if part.get("rope_type") == "longrope"
    ]
    return min((int(limit) for limit in limits if limit), default=None)


def same_frequencies(lengths: NDArray[np.int64], limit: int | None) -> list[NDArray[np.int64]]:
    """The numbers of the rollouts that may be computed together: those up to a limit, and those beyond it.

    Args:
        lengths: int64 [n], of all rollouts.
        limit: see `frequency_limit`.
    """
    if limit is None or not (lengths > limit).any():
        return [np.arange(len(lengths))]
    parts = [np.flatnonzero(lengths <= limit), np.flatnonzero(lengths > limit)]
    return [part for part in parts if len(part)]


def part_of(order: PrefixOrder, members: NDArray[np.int64]) -> PrefixOrder:
    """The order of the rollouts with those numbers."""
    return order if len(members) == len(order) else order.part(np.flatnonzero(np.isin(order.index, members)))


def shared_micro_batches(rollouts: Rollouts, compute: Compute, *, forest: bool) -> list[PrefixOrder]:
    """This rank's micro-batches; all ranks have the same number of them, and some may be empty.

    Ranks that cut the positions of a micro-batch among them take the same ones, of so many times the budget.
    Rows are shared out as trees of one rollout; padding them fills a micro-batch beyond its tokens, so the budget of
    a row is that of the longest.
    """
    everything = prefix_order(rollouts) if forest else _alone(rollouts)
    max_tokens = 1 if compute.one_row and not forest else compute.max_tokens * compute.sequence_size
    mine: list[PrefixOrder] = []
    for members in same_frequencies(rollouts.lengths, compute.frequency_limit):
        longest = rollouts.lengths[members].max(initial=1)
        lengths = rollouts.lengths if forest else np.full(len(rollouts), longest)
        order = part_of(everything, members)
        pieces = Pieces(order, lengths, Cost(pair=compute.pair_cost), cut_as_they_come=compute.cut_as_they_come)
        every = shares(pieces, compute.data_size, max_tokens)
        mine += [order.part(positions) for positions in every[compute.data_rank]]
    return mine


def _alone(rollouts: Rollouts) -> PrefixOrder:
    """Rollouts by length, none sharing anything."""
    by_length = np.argsort(-rollouts.lengths, kind="stable")
    return PrefixOrder(index=by_length, shared=np.zeros(len(by_length), dtype=np.int64))


def forest_micro_batches(
    rollouts: Rollouts,
    max_tokens: int,
    members: NDArray[np.int64] | None = None,
    *,
    cut_as_they_come: bool = False,
) -> list[PrefixOrder]:
    """Pack the prefix trees of a mini-batch, best-fit decreasing.

    Trees stay whole where they fit. One that is larger than the budget is cut between rollouts, where the least is
    computed twice; a single rollout longer than the budget goes alone.

    Args:
        rollouts: the mini-batch.
        max_tokens: forest positions a micro-batch may hold.
        members: int64, numbers of the rollouts that are packed; None for all.
        cut_as_they_come: see `tree_pieces`.

    Returns:
        The micro-batches; together they hold every rollout once.
    """
    order = prefix_order(rollouts)
    if members is not None:
        order = part_of(order, members)
    lengths = rollouts.lengths[order.index]
    runs = tree_pieces(lengths, order.shared, max_tokens, as_they_come=cut_as_they_come)
    before = offsets_from_lengths(lengths - order.shared)
    sizes = [int(order.shared[start] + before[stop] - before[start]) for start, stop in runs]
    bins = best_fit_decreasing(sizes, max_tokens)
    return [order.part(np.concatenate([np.arange(*runs[r]) for r in sorted(members)])) for members in bins]


def row_micro_batches(
    rollouts: Rollouts, max_tokens: int, members: NDArray[np.int64] | None = None
) -> list[NDArray[np.int64]]:
    """Group rollouts of similar length into padded rows of at most `max_tokens` computed tokens, padding included.

    Args:
        rollouts: the mini-batch.
        max_tokens: of a micro-batch; a single rollout longer than that goes alone.
        members: int64, ascending numbers of the rollouts that are grouped; None for all.

    Returns:
        int64 [k] indices of rollouts for each micro-batch, the longest first; together they hold every rollout once.
    """
    lengths = rollouts.lengths
    by_length = np.argsort(-lengths, kind="stable")
    if members is not None:
        by_length = by_length[np.isin(by_length, members)]
    batches: list[NDArray[np.int64]] = []
    start = 0
    while start < len(by_length):
        rows = max(1, max_tokens // int(lengths[by_length[start]]))
        batches.append(by_length[start : start + rows])
        start += rows
    return batches


def best_fit_decreasing(sizes: list[int], capacity: int) -> list[list[int]]:
    """Bins of item numbers: the largest item first, each into the fullest bin that takes it.

    An item larger than the capacity has a bin of its own.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # what is left in each bin, and its number, ascending
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fullest = bisect_left(rooms, (sizes[item], -1))
        if fullest == len(rooms):
            bins.append([])
            room, number = capacity, len(bins) - 1
        else:
            room, number = rooms.pop(fullest)
        bins[number].append(item)
        insort(rooms, (room - sizes[item], number))
    return bins


def predict_values(
    critic: Critic, rollouts: Rollouts, compute: Compute, *, forest: bool, stop: StopRequest | None = None
) -> NDArray[np.float32] | None:
    """The critic's value paired with every response token; see `predict_in_parts`."""
    parts = predict_in_parts(critic, rollouts, compute, forest=forest, stop=stop)
    while True:
        try:
            next(parts)
        except StopIteration as ended:
            return ended.value  # type: ignore[no-any-return]


@torch.no_grad()  # which torch turns off between the steps of a generator
def predict_in_parts(
    critic: Critic, rollouts: Rollouts, compute: Compute, *, forest: bool, stop: StopRequest | None = None
) -> Generator[float, None, NDArray[np.float32] | None]:
    """The critic's value paired with every response token, computed in micro-batches.

    Args:
        critic: on its device.
        rollouts: any number of rollouts; those that stand together should share prompts.
        compute: device, precision and token budget, which is lowered where memory runs out; of several ranks each
            computes its share, and all get all values.
        forest: lay rollouts out as a forest, or as padded rows.
        stop: looked at between micro-batches.

    Yields:
        The share of the response tokens that have their value, 0 to 1, after each micro-batch.

    Returns:
        float32 [T], 0 where response_mask is false; None when asked to stop.
    """
    of_this_rank = max(1, int(rollouts.response_mask.sum())) / compute.ranks.size
    for attempt in attempts(critic, rollouts, compute):
        with attempt:
            parts: list[tuple[NDArray[np.int64], Tensor]] = []
            done = 0
            try:
                # One block around all micro-batches: autocast casts each weight once in it.
                with compute.autocast():
                    for batch in micro_batches(rollouts, compute, forest=forest):
                        if stop is not None and stop.look():
                            return None
                        parts.append((batch.response_tokens, critic(batch).float()))
                        done += len(batch.response_tokens)
                        yield min(1.0, done / of_this_rank)
            finally:
                reshard((critic.trunk, critic.head))
            values = np.zeros(len(rollouts.input_ids), dtype=np.float32)
            if parts:  # read once all are computed: a device that is read from waits for the next micro-batch
                tokens = np.concatenate([tokens for tokens, _ in parts])
                values[tokens] = torch.cat([predicted for _, predicted in parts]).cpu().numpy()
            return compute.ranks.all_reduce_sum(torch.from_numpy(values)).numpy()
    raise AssertionError("attempts end by an error")


def predict_with_progress(
    critic: Critic,
    rollouts: Rollouts,
    compute: Compute,
    *,
    forest: bool,
    stop: StopRequest,
    stage: str,
    before: int,
    total: int,
) -> Generator[Event, None, NDArray[np.float32]]:
    """`predict_in_parts`, with an event after each micro-batch.

    Args:
        critic, rollouts, compute, forest, stop: see there.
        stage: the name of the stage.
        before: rollouts of the stage that were done before these.
        total: rollouts of the stage.

    Yields:
        Progress.

    Returns:
        float32 [T], 0 where response_mask is false.

    Raises:
        Stopped: asked to stop.
    """
    parts = predict_in_parts(critic, rollouts, compute, forest=forest, stop=stop)
    while True:
        try:
            share = next(parts)
        except StopIteration as ended:
            if ended.value is None:
                raise Stopped from None
            return ended.value  # type: ignore[no-any-return]
        if share < 1.0:  # all of them are reported done once they are judged or written
            yield Progress(stage=stage, done=before + int(share * len(rollouts)), total=total)
