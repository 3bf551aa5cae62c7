"""--sequence-parallel: how many ranks cut the positions of each micro-batch among them, given or chosen."""

from typing import NamedTuple

from critic_train.distributed.ranks import Ranks
from critic_train.errors import ConfigError, ModelError
from critic_train.events import Notice
from critic_train.layers.sequence_parallel import HeadShares, SequenceRanks, share_frequencies
from critic_train.model.automatic import Choice
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.selfcheck import PackingChoice, select_packing
from critic_train.model_files.config import config_size
from critic_train.rollouts import Rollouts
from critic_train.settings import EvalComputeSettings, TrainComputeSettings


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


def refuse_sequence_parallel(given: int | None, ranks: Ranks) -> None:
    """Refuse a --sequence-parallel that does not fit the number of ranks.

    Raises:
        ConfigError: it does not divide it.
    """
    if given is None or ranks.size % given == 0:
        return
    fitting = [str(n) for n in range(1, ranks.size + 1) if ranks.size % n == 0]
    count = "1 process" if ranks.size == 1 else f"{ranks.size} ranks"
    raise ConfigError(
        f"--sequence-parallel {given} cuts rollouts over {given} ranks, and this is a run on {count}",
        hint=f"--nproc {given}, or start as many by torchrun; or leave --sequence-parallel out"
        if ranks.size == 1
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
        _refuse_rows(packing, settings)
        compute.sequence = None
        for handle in sharing:
            handle.remove()
        notices.append(Notice(message="padded rows are not cut over ranks: each of them computes whole rollouts"))
        choice = None
    if compute.sequence is None and packing.forest and longest > (settings.max_tokens or longest):
        notices.append(Notice(message=_goes_alone(longest, settings.max_tokens or 1, compute.ranks.size)))
    return ChosenLayout(packing, notices, [] if choice is None else [choice])


def _share_long_rollouts(
    critic: Critic,
    compute: Compute,
    settings: TrainComputeSettings | EvalComputeSettings,
    longest: int,
    *,
    measured: bool,
) -> Choice | None:
    """Set `sequence` as it is asked for, or as the budgets ask for; None where each rank computes whole rollouts."""
    size, given = compute.ranks.size, settings.sequence_parallel
    if size == 1 or given == 1 or (settings.packing == "rows" and given is None):
        return None
    number, reason = given or 1, f"{given} ranks cut the positions of each micro-batch among them"
    if given is None and (settings.max_tokens is not None or measured):
        holding = ranks_that_hold(longest, compute.max_tokens, size)
        number = holding or size
        reason = f"the longest rollout has {longest:,} tokens, and one rank takes {compute.max_tokens:,} at once"
        if holding is None:
            reason += f"; all {size} take {size * compute.max_tokens:,}"
    if number == 1:
        return None
    compute.sequence = SequenceRanks(
        group=compute.ranks.adjacent(number), size=number, rank=compute.ranks.rank % number
    )
    return Choice(name="sequence_parallel", value=number, reason=reason + _filling(critic, number))


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


def _refuse_rows(packing: PackingChoice, settings: TrainComputeSettings | EvalComputeSettings) -> None:
    if settings.sequence_parallel is not None:
        raise ModelError(
            f"--sequence-parallel {settings.sequence_parallel} cuts prefix trees over ranks, not padded rows: "
            f"{packing.reason or '--packing rows'}",
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
