"""A frozen trunk is computed once: its states are kept, and given to the trained part in place of tokens."""

from collections.abc import Generator, Iterator

import torch

from critic_train.distributed.faults import looks_lost
from critic_train.errors import MachineError
from critic_train.events import Event, Progress
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.freezing import upper_part_agrees
from critic_train.model.memory import in_memory, is_out_of_memory
from critic_train.model.microbatches import micro_batches
from critic_train.rollouts import Rollouts
from critic_train.stopping import StopRequest
from critic_train.training.dataset import ROLLOUTS_AT_ONCE, RolloutSet
from critic_train.training.kept_states import KeptStates, clear_states, open_states
from critic_train.training.states_writer import Computed, Share, StatesWriter

TOLERANCE = 1e-4
"""Largest difference of a hidden state, relative to the largest: right is exact, or a rounding."""


def give_states(critic: Critic, layers: int, sample: Rollouts, compute: Compute, *, forest: bool) -> bool:
    """Have the critic take kept states in place of tokens, where its last layers work on them.

    Args:
        critic: frozen below its last layers.
        layers: how many of them are trained; 0 for the head alone.
        sample: a few rollouts to try.
        compute: device, precision and token budget.
        forest: lay rollouts out as a forest, or as padded rows.

    Returns:
        Whether the critic will take them, on all ranks alike.
    """
    critic.give_states_to_last(layers)
    upper = critic.upper
    if upper is None:
        return True

    def agree() -> bool:
        batch = next(iter(micro_batches(sample, compute, forest=forest)))
        try:
            with compute.ranks.in_float32((critic.trunk, critic.head)):
                agrees = upper_part_agrees(critic.trunk, upper, batch, TOLERANCE)
        except (TypeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error) or looks_lost(error):
                raise
            agrees = False
        return not int(compute.ranks.total(torch.tensor([not agrees], dtype=torch.int64)))

    return in_memory(agree, sample, compute, critic)


def not_kept(critic: Critic) -> str:
    """What to tell the user where the critic takes no kept states."""
    return (
        f"the last layers of {critic.trunk.config.model_type} do not work on kept states: every epoch goes through the "
        "frozen part again"
    )


def keep_states(
    critic: Critic, rollouts: RolloutSet, compute: Compute, *, forest: bool, stop: StopRequest
) -> Generator[Event, None, KeptStates | None]:
    """Compute the states of a frozen trunk once, or find them from an earlier start. All ranks call it.

    Args:
        critic: with its frozen part in place.
        rollouts: all rollouts of one spool whose states will be wanted; its directory is one that all ranks see.
        compute: device, precision and token budget, which is lowered where memory runs out.
        forest: lay rollouts out as a forest, or as padded rows.
        stop: looked at between micro-batches.

    Yields:
        Progress.

    Returns:
        The states; None when asked to stop.

    Raises:
        OSError: the disk is full.
        MachineError: a rank does not see what the others wrote, or has no memory for a single rollout.
    """
    spool, read_only, ranks = rollouts.spool, critic.upper is None, compute.ranks
    hidden_size = int(critic.trunk.config.hidden_size)
    stand = False
    if ranks.leads:
        stand = open_states(spool, hidden_size, read_only=read_only) is not None
        if not stand:
            clear_states(spool)
    if not ranks.told(stand):
        done = 0
        yield Progress(stage="keeping the frozen trunk's states", done=0, total=len(rollouts))
        try:
            with StatesWriter(spool, hidden_size, read_only=read_only, ranks=ranks) as writer:
                for places, batch in rollouts.by_group(ROLLOUTS_AT_ONCE):
                    writer.keep(rollouts.index[places], _share(writer, critic, batch, compute, forest, stop))
                    done += len(places)
                    yield Progress(stage="keeping the frozen trunk's states", done=done, total=len(rollouts))
        except _StoppedError:
            return None
        ranks.told(True)  # from here on they stand
    states = open_states(spool, hidden_size, read_only=read_only)
    if states is None:
        raise MachineError(
            f"rank {ranks.rank} does not see the states that were kept in {spool.directory}",
            hint="--out must be on a file system that all machines share",
        )
    return states


class _StoppedError(Exception):
    """Asked to stop; what was begun is removed."""


def _share(
    writer: StatesWriter, critic: Critic, batch: Rollouts, compute: Compute, forest: bool, stop: StopRequest
) -> Share:
    """This rank's share of some rollouts, computed and written, in smaller micro-batches where memory runs out."""

    def attempt() -> Share | None:
        try:
            return writer.write(batch, _computed(critic, batch, compute, forest=forest, stop=stop))
        except _StoppedError:
            return None
        finally:
            compute.ranks.in_parts((critic.trunk, critic.head))

    share = in_memory(attempt, batch, compute, critic)
    if share is None:
        raise _StoppedError
    return share


@torch.no_grad()
def _computed(
    critic: Critic, rollouts: Rollouts, compute: Compute, *, forest: bool, stop: StopRequest
) -> Iterator[Computed]:
    for batch in micro_batches(rollouts, compute, forest=forest):
        if stop.look():
            raise _StoppedError
        with compute.autocast():
            states = critic.states_below(batch)
        yield batch, states.float().cpu().numpy()
