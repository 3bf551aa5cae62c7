"""--sequence-parallel: how many ranks cut the positions of each micro-batch among them, given or chosen."""

import math
from typing import NamedTuple

import torch

from critic_train.errors import ConfigError, ModelError
from critic_train.events import Notice
from critic_train.layers.sequence_parallel import HeadShares, SequenceRanks, share_frequencies
from critic_train.model.automatic import Choice
from critic_train.model.compute import Compute, Cut
from critic_train.model.critic import Critic
from critic_train.model.oom import attention_heads
from critic_train.model.selfcheck import PackingChoice, select_packing
from critic_train.model_files.config import config_size, head_size
from critic_train.rollouts import Rollouts
from critic_train.settings import EvalComputeSettings, TrainComputeSettings
from critic_train.text import format_bytes


class ChosenLayout(NamedTuple):
    """How micro-batches are laid out.

    Attributes:
        packing: of the rollouts.
        notices: what to tell the user about it.
        cuts: how many ranks cut the positions of a micro-batch among them; none where each computes whole rollouts.
    """

    packing: PackingChoice
    notices: list[Notice]
    cuts: list[Choice]


def refuse_sequence_parallel(settings: TrainComputeSettings | EvalComputeSettings, size: int) -> None:
    """Refuse a --sequence-parallel that does not fit the number of ranks or --packing, before anything is read.

    Raises:
        ConfigError: it does not divide the number of ranks, or padded rows are asked for.
    """
    given = settings.sequence_parallel
    if given is None or given == 1:
        return
    if settings.packing == "rows":
        raise ConfigError(
            f"--sequence-parallel {given} cuts prefix trees over ranks, not padded rows: --packing rows",
            hint="leave --packing rows out; or --sequence-parallel 1, with a --max-tokens that one rank can take",
        )
    if size % given == 0:
        return
    fitting = [str(n) for n in range(1, size + 1) if size % n == 0]
    count = "1 process" if size == 1 else f"{size} ranks"
    raise ConfigError(
        f"--sequence-parallel {given} cuts rollouts over {given} ranks, and this is a run on {count}",
        hint=f"--nproc {given}, or start as many by torchrun; or leave --sequence-parallel out"
        if size == 1
        else f"--sequence-parallel {', '.join(fitting[:-1])} or {fitting[-1]}; or another number of ranks",
    )


def ranks_that_hold(longest: int, max_tokens: int, size: int) -> int | None:
    """The smallest number of ranks, a divisor of `size`, whose budgets together hold the longest rollout, if any."""
    numbers = (n for n in range(1, size + 1) if size % n == 0 and n * max_tokens >= longest)
    return next(numbers, None)


def choose_layout(
    critic: Critic,
    rollouts: Rollouts,
    settings: TrainComputeSettings | EvalComputeSettings,
    compute: Compute,
    *,
    longest: int,
    tokens: int | None = None,
    before: ChosenLayout | None = None,
) -> ChosenLayout:
    """Choose how many ranks cut the positions of a micro-batch among them, and then packing and attention.

    All ranks call it.

    Args:
        critic, rollouts, settings, compute, tokens: see `select_packing`; `sequence` of `compute` is set as well.
        longest: tokens of the longest rollout.
        before: what this gave before a token budget that is not given was fitted to the device's memory, which it now
            is; given back where nothing changes. Before that, such a budget asks for nothing.

    Raises:
        ModelError, MachineError: see `select_packing`; or padded rows are to be cut over ranks.
    """
    if before is not None and compute.sequence is not None:
        return before
    choice = _share_long_rollouts(critic, compute, settings, longest, measured=before is not None)
    if before is not None and choice is None:
        return before
    sharing = [] if compute.sequence is None else share_frequencies(critic.trunk, compute.sequence)
    packing, sentences = select_packing(critic, rollouts, settings, compute, tokens=tokens)
    notices = [Notice(message=sentence, level="warning") for sentence in sentences]
    if compute.sequence is not None and not packing.forest:
        refuse_rows(packing.reason, settings)
        compute.sequence = None
        for handle in sharing:
            handle.remove()
        notices.append(Notice(message="padded rows are not cut over ranks: each of them computes whole rollouts"))
        choice = None
    if compute.sequence is None and packing.forest and longest > (settings.max_tokens or longest):
        notices.append(Notice(message=_goes_alone(longest, settings.max_tokens or 1, compute.ranks.size)))
    return ChosenLayout(packing, notices, [] if choice is None else [choice])


def ranks_to_cut(
    settings: TrainComputeSettings | EvalComputeSettings, size: int, longest: int, max_tokens: int, *, measured: bool
) -> tuple[int, str]:
    """How many of `size` ranks cut the positions of a micro-batch among them, and why.

    Args:
        settings: what was given.
        size: ranks of the run.
        longest: tokens of the longest rollout.
        max_tokens: what one rank takes at once.
        measured: whether that was fitted to a device's memory.
    """
    given = settings.sequence_parallel
    if given is not None:
        return given, f"{given} ranks cut the positions of each micro-batch among them"
    if size == 1 or settings.packing == "rows" or not (settings.max_tokens is not None or measured):
        return 1, ""
    holding = ranks_that_hold(longest, max_tokens, size)
    reason = f"the longest rollout has {longest:,} tokens, and one rank takes {max_tokens:,} at once"
    if holding is None:
        reason += f"; all {size} take {size * max_tokens:,}"
    return holding or size, reason


def _share_long_rollouts(
    critic: Critic,
    compute: Compute,
    settings: TrainComputeSettings | EvalComputeSettings,
    longest: int,
    *,
    measured: bool,
) -> Choice | None:
    """Set `sequence` as it is asked for, or as the budgets ask for; None where each rank computes whole rollouts."""
    if compute.ranks.size == 1:  # also of a dry run, which is told of the others
        return None
    number, reason = ranks_to_cut(settings, compute.ranks.size, longest, compute.max_tokens, measured=measured)
    if number == 1:
        return None
    compute.sequence = SequenceRanks(
        group=compute.ranks.adjacent(number), size=number, rank=compute.ranks.rank % number
    )
    return Choice(name="sequence_parallel", value=number, reason=reason + _filling(critic, number))


NVLINK, PCIE = 450e9, 50e9
"""Bytes a second in one direction: NVLink 4 among the GPUs of a machine, and PCIe 5 to its memory (NVIDIA H100)."""


def cut_before_host_memory(
    critic: Critic, compute: Compute, settings: TrainComputeSettings, *, forest: bool
) -> Cut | None:
    """What to do where a rollout still does not fit: None where its layer inputs should go to host memory first.

    For a position and a layer under activation checkpointing, the all-to-all passes queries, keys, values and outputs
    three times (forward, again, backward), all but the part that stays on the rank; host memory takes the layer's
    input in float32 and gives it back. Ranks of one machine are taken to be linked by NVLink, and no others to be.

    Args:
        critic: its sizes are read.
        compute: of the run, on CUDA devices.
        settings: what was given.
        forest: whether rollouts are laid out as a forest; padded rows are not cut.
    """
    if compute.device.type != "cuda" or compute.sequence is not None or not forest or settings.sequence_parallel:
        return None
    ranks = math.gcd(compute.ranks.size, torch.cuda.device_count())
    heads = sum(attention_heads(critic.trunk.config, ranks)) * head_size(critic.trunk.config)
    exchanged = 3 * (2 if compute.precision == "bf16" else 4) * heads * (1 - 1 / ranks)
    copied = 2 * 4 * int(critic.trunk.config.hidden_size)
    by_nvlink, by_pcie = exchanged / NVLINK, copied / PCIE
    if ranks == 1 or by_nvlink >= by_pcie:
        return None
    return Cut(
        ranks=ranks,
        reason=f"for a token and a layer an all-to-all over NVLink takes {1e9 * by_nvlink:,.0f} ns "
        f"({format_bytes(exchanged)}), and its input over PCIe to host memory and back {1e9 * by_pcie:,.0f} ns "
        f"({format_bytes(copied)}); --sequence-parallel 1 cuts nothing",
    )


def _goes_alone(longest: int, max_tokens: int, size: int) -> str:
    number = ranks_that_hold(longest, max_tokens, size)
    if number is not None:
        cut = f"--sequence-parallel {number} cuts it over {number} ranks"
    else:
        number = 2 ** (-(-longest // max_tokens) - 1).bit_length()
        cut = f"{number} ranks with --sequence-parallel {number} cut it over them"
    return (
        f"the longest rollout has {longest:,} tokens: beyond --max-tokens {max_tokens:,} a rollout goes through the "
        f"model alone; {cut}"
    )


def refuse_rows(reason: str, settings: TrainComputeSettings | EvalComputeSettings) -> None:
    """Refuse a given --sequence-parallel where rollouts are laid out as padded rows, though they were not asked for.

    Args:
        reason: of the padded rows; empty where it has been told.
        settings: what was given.

    Raises:
        ModelError: it is more than 1.
    """
    if (settings.sequence_parallel or 1) > 1:
        raise ModelError(
            f"--sequence-parallel {settings.sequence_parallel} cuts prefix trees over ranks, not padded rows"
            + (f": {reason}" if reason else ""),
            hint="--sequence-parallel 1, with a --max-tokens that one rank can take",
        )


def _filling(critic: Critic, number: int) -> str:
    """What is computed in vain where the heads of attention cannot be divided, as the rest of a sentence."""
    config = critic.trunk.config
    heads = config_size(config, "num_attention_heads")
    kv_heads = config_size(config, "num_key_value_heads") or heads
    if not heads or not kv_heads or heads % kv_heads:
        return ""
    computed = HeadShares(heads, kv_heads, number).computed
    return "" if computed == heads else f"; attention computes {computed} heads for its {heads}"
