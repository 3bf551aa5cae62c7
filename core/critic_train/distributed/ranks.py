"""The processes of a run as one of them sees them. One process alone is a group of one: it waits for nobody.

Nothing of torch.distributed is imported here; `group` is the real thing and is loaded only where there are several.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from critic_train.errors import ConfigError
from critic_train.settings import Settings
from critic_train.stopping import StopRequest


class Ranks:
    """A group of one.

    Attributes:
        rank: this process's number, from 0. Rank 0 leads: it alone yields events that are shown, writes and judges.
        size: how many there are.
        local_rank: this process's number on its machine.
        sharded: whether a critic lies in parts, through FSDP2: on several ranks, or on one that keeps its only part in
            host memory.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    sharded: bool = False

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def agreeing(self, stop: StopRequest) -> StopRequest:
        """The same request, of which all ranks together are asked: a signal to one stops all, at the same place."""
        return stop

    def tell(self, value: Any) -> None:
        """Rank 0 tells the others something that JSON can hold. They wait for it in `hear`."""

    def hear(self) -> Any:
        """What rank 0 told next. Waits as long as rank 0 lives, for it may be reading for hours."""
        raise AssertionError("rank 0 tells, the others hear")

    def told(self, value: Any) -> Any:
        """`tell` on rank 0, `hear` on the others, which pass anything."""
        if self.leads:
            self.tell(value)
            return value
        return self.hear()

    def total(self, numbers: torch.Tensor) -> torch.Tensor:
        """Sums of a CPU tensor's numbers over all ranks."""
        return numbers

    def total_of(self, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
        """The same of an array."""
        return numbers

    def sum_gradients(self, modules: Sequence[torch.nn.Module], *, now: bool) -> None:
        """Say whether the next backward pass sums these modules' gradients over ranks, or leaves it to a later one."""

    def in_float32(self, modules: Sequence[torch.nn.Module]) -> AbstractContextManager[None]:
        """Inside, these modules' weights are float32 where they compute, whatever they are gathered in elsewhere."""
        return nullcontext()

    def in_parts(self, modules: Sequence[torch.nn.Module]) -> None:
        """After a pass without gradients: let go of the weights of these modules that it has left whole."""

    def spread(self, critic: torch.nn.Module, mesh: Any) -> None:
        """Remember that a critic lies in parts on the ranks of a device mesh, for `meet_again`."""

    def attempting(self) -> None:
        """Begin what `ran_out` may end. All ranks must end it with an exchange, so that it ends on none alone."""

    def ran_out(self, error: BaseException, *, here: bool) -> str | None:
        """What was said of the memory that ran out in this attempt, on whichever rank; None for any other error.

        Args:
            error: what ended the attempt on this rank.
            here: whether it says that this rank's memory ran out, and not only that another one is gone.
        """
        return str(error) if here else None

    def meet_again(self) -> None:
        """After `ran_out` on all ranks: bring them together as they were between attempts, for another one.

        Raises:
            CriticTrainError: one does not come; or it has met another fault, which is raised here.
        """


SINGLE_PROCESS = Ranks()


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """Which rank a process is, as torchrun, Slurm or rank 0 told it through the environment."""

    rank: int
    size: int
    local_rank: int


def rank_info() -> RankInfo | None:
    """The place in RANK, WORLD_SIZE and LOCAL_RANK; None for a process that is alone.

    Raises:
        ConfigError: the variables are no numbers, or do not fit together.
    """
    said = {name: os.environ.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        rank, size, local_rank = (int(value) for value in said.values())
    except ValueError:
        raise ConfigError(f"the environment says {said}: these must be numbers") from None
    if size <= 1:
        return None
    if not (0 <= rank < size and 0 <= local_rank < size):
        raise ConfigError(f"the environment says RANK {rank} and LOCAL_RANK {local_rank} of WORLD_SIZE {size}")
    return RankInfo(rank=rank, size=size, local_rank=local_rank)


@contextmanager
def init_ranks(settings: Settings, *, nproc: int, device: str, sharded: bool = False) -> Iterator[Ranks]:
    """The ranks of this run: those that the environment tells of (torchrun), `nproc` on this machine, or one.

    Whatever ends the block on one rank ends it on all: a fault is told to the others, so that rank 0 raises it
    whoever met it.

    Args:
        settings: of the command, for the ranks that are started here.
        nproc: how many processes to run on this machine where the environment tells of none.
        device: the setting; "cuda" and "auto" give every rank a device of its own.
        sharded: whether one process alone is to be a group as well.

    Raises:
        ConfigError: both the environment and `nproc` ask for ranks, and differ.
        MachineError: a rank does not come, is lost, or there are fewer devices than ranks.
    """
    here = rank_info()
    if here is None and nproc == 1 and not sharded:
        yield SINGLE_PROCESS
        return
    if here is not None and nproc not in (1, here.size):
        raise ConfigError(
            f"--nproc {nproc}, but the environment says that this is one of {here.size} processes",
            hint="leave --nproc out under torchrun or srun",
        )
    from critic_train.distributed.launch import Workers
    from critic_train.distributed.process_group import Group

    with Workers(settings, nproc if here is None else 1) as workers, Group(here, workers, device) as group:
        yield group
