"""Settings that choose themselves: precision, offload, activation checkpointing, and tokens at once.

On a CPU they are float32 and 4,096 tokens. On a CUDA device the trunk computes in bf16 where the device has it, and as
many tokens go through it at once as its memory holds: passes measure what a token costs (`memory_use`), so no formula
has to know the architecture, and one of the largest micro-batch confirms it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from critic_train.layers.prefix_tree import build_tree_layout, prefix_order
from critic_train.model.compute import Compute, Keeping
from critic_train.model.critic import Critic
from critic_train.model.fsdp import can_reset_after_error, reset_after_error
from critic_train.model.memory import set_keeping
from critic_train.model.memory_use import MemoryUse, measure_further, measure_memory, peak
from critic_train.model.oom import is_out_of_memory, release_memory
from critic_train.model.tiles import can_compute_in_tiles, tile_size
from critic_train.model_files.tensor_file import part_here
from critic_train.rollouts import Rollouts
from critic_train.settings import (
    KEEPS_LAYER_INPUTS,
    ActivationCheckpointing,
    Offload,
    OptimizerKind,
    TrainComputeSettings,
    offloads,
)
from critic_train.text import format_bytes

FAR, FAR_ON_RANKS = 0.75, 0.5
"""Share of the tokens that fit by two small passes with which a further one is measured. Of several ranks, those that
do not run out of memory would hang: they make one that fits in any case."""
RESERVED_SHARE = 0.08
"""Share of the device's memory left to fragmentation, to the libraries' workspaces and to other processes."""
USEFUL_TOKENS = 8_192
"""With fewer at once a GPU computes at less than its rate; more are taken where a prompt's tree has more."""
MOST_TOKENS = 65_536
"""More than this is taken at once only for a single longer rollout: a larger step computes no faster."""
TRIALS = 4
MOMENT_BYTES: dict[OptimizerKind, int] = {"adamw": 8, "adamw-8bit": 2}
"""Bytes a trained parameter."""
CHECKPOINTING: tuple[ActivationCheckpointing, ...] = ("none", "selective", "layer", "layer-tiles")
"""From the fastest to the one that holds the least."""
COMPILED_CHECKPOINTING: tuple[ActivationCheckpointing, ...] = ("none", "layer")
"""A compiled layer has no single operations to select from."""
INPUTS_ON_HOST = "the inputs of the layers wait in host memory, for nothing else lets as much fit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A setting that has chosen itself.

    Attributes:
        name: the settings field.
        value: what it is now.
        reason: why, for a person.
    """

    name: str
    value: Any
    reason: str

    def sentence(self) -> str:
        """For a notice."""
        return f"--{self.name.replace('_', '-')} {self.value}: {self.reason}"


def choose_offload(
    critic: Critic, compute: Compute, kind: OptimizerKind, device_bytes: int, more: int = 0
) -> Choice | None:
    """Keep the moments in host memory where the device would not hold them beside weights and gradients.

    Args:
        critic: on the CPU or on "meta".
        compute: of the run.
        kind: --optimizer.
        device_bytes: memory of the device.
        more: parameters that it is yet to be given, and that are trained.

    Returns:
        The choice, None where nothing has to be offloaded.
    """
    weights = 4 * (more + sum(p.numel() for p in critic.parameters()))
    trained = more + sum(p.numel() for p in critic.parameters() if p.requires_grad)
    cast = weights // 2 if compute.precision == "bf16" else 0
    moments = MOMENT_BYTES[kind] * trained
    total = (weights + 4 * trained + moments + average_bytes(critic, compute)) / compute.ranks.size + cast
    if total < (1 - 2 * RESERVED_SHARE) * device_bytes or kind != "adamw":
        return None
    return Choice(
        name="offload",
        value="optimizer",
        reason=f"weights, gradients and moments take {format_bytes(total)} of the device's "
        f"{format_bytes(device_bytes)}: the moments, {format_bytes(moments / compute.ranks.size)}, wait in host memory",
    )


def average_bytes(critic: Critic, compute: Compute) -> int:
    """What this rank's part of the average takes, in float32; 0 where a run keeps none."""
    return 4 * sum(part_here(p).numel() for p in critic.averaged_parameters().values()) * compute.averages_weights


def with_offload(
    critic: Critic, compute: Compute, settings: TrainComputeSettings, kind: OptimizerKind, more: int
) -> tuple[Compute, list[Choice]]:
    """A run's `compute` with what it offloads, where that chooses itself; and the choice, if something is.

    `more` is as in `choose_offload`.
    """
    if settings.offload != "auto" or compute.device.type != "cuda":
        return compute, []
    choice = choose_offload(critic, compute, kind, torch.cuda.mem_get_info(compute.device)[1], more)
    return replace(compute, offload="none" if choice is None else choice.value), [] if choice is None else [choice]


def set_memory(
    critic: Critic,
    compute: Compute,
    settings: TrainComputeSettings,
    kind: OptimizerKind,
    largest: Rollouts,
    *,
    forest: bool,
) -> tuple[ActivationCheckpointing, list[Choice]]:
    """Set activation checkpointing and the token budget of a run: as given, or as they choose themselves.

    Args:
        critic: on its device, in training mode, its packing chosen.
        compute: of the run; its `max_tokens` is set.
        settings: what was given.
        kind: --optimizer.
        largest: the rollouts of the largest prompt.
        forest: how rollouts are laid out.

    Returns:
        (the kind of checkpointing that is set, what was chosen).
    """
    given = settings.activation_checkpointing
    on_cuda = compute.device.type == "cuda"
    kinds: Sequence[ActivationCheckpointing] = (given,)
    if given == "auto":
        kinds = COMPILED_CHECKPOINTING if settings.compile else CHECKPOINTING
        if on_cuda and "layer-tiles" in kinds and not can_compute_in_tiles(critic):
            kinds = kinds[:-1]
    keepings = _keepings(kinds, settings.offload, on_cuda=on_cuda)
    choices = list[Choice]()
    if on_cuda and (given == "auto" or settings.max_tokens is None):
        keeping, choices = choose_memory(
            critic,
            compute,
            forest=forest,
            optimizer=kind,
            keepings=keepings,
            max_tokens=settings.max_tokens,
            largest=largest,
        )
    else:
        keeping = keepings[0]
        set_keeping(critic, compute, keeping)
    # Of several ranks, those that do not run out of memory hang meanwhile.
    if compute.may_keep_less and compute.ranks.size == 1 and not settings.compile:
        # A resumed run is given what it offloaded at first.
        offload: Offload = "auto" if compute.may_offload else settings.offload
        every = [each for each in _keepings(CHECKPOINTING, offload, on_cuda=on_cuda) if each.kind != "selective"]
        compute.keep_less = tuple(every[every.index(keeping) + 1 :] if keeping in every else every[1:])
    return keeping.kind, choices


def _keepings(kinds: Sequence[ActivationCheckpointing], offload: Offload, *, on_cuda: bool) -> list[Keeping]:
    """What a run may keep for its backward pass, the fastest first; what --offload activations moves is there then."""
    if on_cuda and offloads(offload, "activations"):
        return [Keeping(kind, on_host=True) for kind in kinds if kind in KEEPS_LAYER_INPUTS]
    keepings = [Keeping(kind) for kind in kinds]
    if on_cuda and offload == "auto" and kinds[-1] in KEEPS_LAYER_INPUTS:
        keepings.append(Keeping(kinds[-1], on_host=True))
    return keepings


def choose_tokens(critic: Critic, compute: Compute, *, forest: bool, largest: Rollouts) -> None:
    """How many tokens go through a critic at once without gradients; on a CPU the budget stays what it is.

    Args:
        critic: on its device.
        compute: of the job; its `max_tokens` is set.
        forest: how rollouts are laid out.
        largest: the rollouts of the largest prompt, or those that are at hand.
    """
    if compute.device.type == "cuda":
        use = measure_memory(critic, compute, forest=forest, training=False)
        _set_tokens(compute, use, 0, largest)


def choose_memory(
    critic: Critic,
    compute: Compute,
    *,
    forest: bool,
    optimizer: OptimizerKind,
    keepings: Sequence[Keeping],
    max_tokens: int | None,
    largest: Rollouts,
) -> tuple[Keeping, list[Choice]]:
    """Activation checkpointing and tokens at once of a run on a CUDA device. All ranks call it.

    Nothing is computed again where the largest prompt's tree, or USEFUL_TOKENS, fits without; else as little as lets
    it fit; and layer inputs go to host memory only where it is not cheaper that ranks cut the longest rollout.

    Args:
        critic: on its device, in training mode, nothing set for checkpointing yet.
        compute: of the run; its `max_tokens` is set.
        forest: how rollouts are laid out.
        optimizer: --optimizer.
        keepings: to choose from, the fastest first.
        max_tokens: --max-tokens; None chooses.
        largest: the rollouts of the largest prompt.

    Returns:
        (what is set, what was chosen).
    """
    trained = sum(part_here(p).numel() for p in critic.parameters() if p.requires_grad)
    on_device = not (offloads(compute.offload, "optimizer") or offloads(compute.offload, "all"))
    moments = MOMENT_BYTES[optimizer] * trained if on_device else 0
    moments += 0 if offloads(compute.offload, "all") else average_bytes(critic, compute)
    wanted = max_tokens or -(-_useful_tokens(largest, forest=forest) // compute.sequence_size)
    for keeping in keepings:
        set_keeping(critic, compute, keeping)
        # A tile's intermediate results are there once, however many tokens there are: measured beyond one.
        tile = tile_size(critic) if keeping.kind.endswith("tiles") else 0
        last = keeping == keepings[-1]
        use = _measured(critic, compute, forest=forest, beyond=tile, last=last)
        if use is None:
            continue
        choice = _set_tokens(compute, use, moments, largest)
        last_on_device = keepings[-1] == keeping._replace(on_host=True) != keeping
        if last or last_on_device or compute.max_tokens >= wanted:
            choice = _set_tokens(compute, _measured_further(critic, compute, use, forest=forest), moments, largest)
        if compute.max_tokens >= wanted or (
            cut := compute.cheaper_cut(int(largest.lengths.max())) if last_on_device else ""
        ):
            break
    choices = []
    if len(keepings) > 1:
        fits = f"{compute.max_tokens:,} tokens fit at once, {wanted:,} are wanted"
        if compute.max_tokens < wanted:
            fits += cut or ", and it holds the least"
        choices.append(Choice(name="activation_checkpointing", value=keeping.kind, reason=fits))
    if keeping.on_host and len(keepings) > 1 and not keepings[0].on_host:
        choices.append(Choice(name="offload", value=compute.offload, reason=INPUTS_ON_HOST))
    if max_tokens is None:
        return keeping, [*choices, choice]
    compute.start_at(max_tokens)
    return keeping, choices


def _measured(critic: Critic, compute: Compute, *, forest: bool, beyond: int, last: bool) -> MemoryUse | None:
    """What a position costs; None where even the few of a measurement do not fit, and something is left to try."""
    try:
        return measure_memory(critic, compute, forest=forest, training=True, beyond=beyond)
    except Exception as error:
        if last or not _goes_on(critic, compute, error):
            raise
    return None


def _measured_further(critic: Critic, compute: Compute, use: MemoryUse, *, forest: bool) -> MemoryUse:
    """The same by a pass of nearly as many tokens as are set, or of half of them wherever that does not fit."""
    alone = compute.ranks.size == 1 and can_reset_after_error(critic.trunk)
    tokens = int((FAR if alone else FAR_ON_RANKS) * compute.max_tokens)
    while True:
        try:
            return measure_further(critic, compute, use, tokens, forest=forest)
        except Exception as error:
            if not _goes_on(critic, compute, error):
                raise
        tokens //= 2


def _goes_on(critic: Critic, compute: Compute, error: Exception) -> bool:
    """Whether an error says that memory ran out where that can be undone; then it is."""
    if compute.ranks.size > 1 or not (is_out_of_memory(error) and can_reset_after_error(critic.trunk)):
        return False
    reset_after_error(critic.parts)
    critic.zero_grad(set_to_none=True)
    release_memory(compute.device)
    return True


def try_largest(critic: Critic, compute: Compute, largest: Rollouts, *, forest: bool) -> str:
    """Take the largest micro-batch of the largest prompt forward and backward, and lower the budget until it fits.

    On one process. Returns a sentence where the budget had to be lowered, else an empty string.
    """
    before = compute.max_tokens
    for _ in range(TRIALS):
        error = ""
        try:
            peak(critic, compute, largest, forest=forest, training=True)
        except Exception as raised:
            if not is_out_of_memory(raised):
                raise
            error = str(raised)
        critic.zero_grad(set_to_none=True)
        release_memory(compute.device)
        if not error:
            break
        compute.start_at(max(int(largest.lengths.max()), int(0.75 * compute.max_tokens)))
    if compute.max_tokens == before:
        return ""
    return f"--max-tokens {compute.max_tokens}: the largest prompt did not fit at {before:,} tokens at once"


def _set_tokens(compute: Compute, use: MemoryUse, moments: float, largest: Rollouts) -> Choice:
    """Set a job's token budget to what fits beside the moments, on the rank that has the least memory."""
    available = device_room(compute.device) - moments
    fitting = use.tokens(available)
    per_rank = torch.zeros(compute.ranks.size, dtype=torch.float64)
    per_rank[compute.ranks.rank] = fitting
    fitting = int(compute.ranks.all_reduce_sum(per_rank).min())
    most = max(MOST_TOKENS, -(-int(largest.lengths.max()) // compute.sequence_size))
    tokens = max(1, min(fitting, most))
    compute.start_at(tokens)
    reason = (
        f"a token takes {format_bytes(use.per_token)} beside {format_bytes(use.fixed + moments)}, and "
        f"{format_bytes(available + moments)} are free"
    )
    if fitting > most:
        reason += f"; {fitting:,} would fit"
    return Choice(name="max_tokens", value=tokens, reason=reason)


def device_room(device: torch.device) -> float:
    """Bytes that this process may hold on a CUDA device: what is free or its own, but for RESERVED_SHARE of all."""
    free, total = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device) - RESERVED_SHARE * total)


def _useful_tokens(largest: Rollouts, *, forest: bool) -> int:
    positions = len(build_tree_layout(largest, prefix_order(largest))) if forest else int(largest.lengths.max())
    return max(int(largest.lengths.max()), min(MOST_TOKENS, max(USEFUL_TOKENS, positions)))
