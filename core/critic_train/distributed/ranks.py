"""The processes of a run as one of them sees them: a Protocol, and its implementation for a single process.

Neither torch nor torch.distributed is imported here: `process_group` is loaded only where there are several processes,
and a command without a model needs no torch.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from critic_train.errors import ConfigError, MachineError
from critic_train.stopping import StopRequest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class OutOfMemory:
    """Memory that ran out on one of several ranks, as that rank reports it to the others.

    Attributes:
        rank: the rank.
        attempt: the number of the attempt that it ran out in, see `Ranks.begin_attempt`.
        what: what was tried, as in "memory ran out with 16,384 tokens at once".
        error: the message of the error.
        hint: what the user can do.
        next_start: what the same command is to begin with next time, as JSON can hold it; empty where no smaller
            budget helps.
    """

    rank: int
    attempt: int
    what: str
    error: str
    hint: str
    next_start: dict[str, int]


class StateSaver(Protocol):
    """Writes the state of the last whole step after memory ran out; called in a thread beside the main one.

    The main thread may hang in a collective. Weights and moments are those of the last optimizer step meanwhile.
    """

    def write_part(self, report_progress: Callable[[], None]) -> None:
        """On ranks other than 0: write this rank's part.

        Args:
            report_progress: to be called after every tensor; a rank that does not for a minute is given up.
        """

    def finish(self, report: OutOfMemory, wait_for_parts: Callable[[], None]) -> tuple[str, str]:
        """On rank 0: put the parts together.

        Args:
            report: what happened.
            wait_for_parts: returns when all other ranks have written theirs; raises MachineError where one cannot.

        Returns:
            (message, hint) with which the run ends on all ranks.
        """


class Ranks(Protocol):
    """All processes of a run.

    Attributes:
        rank: this process's number, from 0. Rank 0 alone yields events that are shown, writes and judges.
        size: how many processes there are.
        local_rank: this process's number on its machine.
        sharded: whether models are sharded by FSDP2: on several ranks, or on one that keeps its part in host memory.
    """

    rank: int
    size: int
    local_rank: int
    sharded: bool

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on all ranks; the others wait as long as rank 0 lives, for it may be reading for hours.

        Args:
            value: on rank 0, something that JSON can hold; ignored on the others.
        """

    def all_reduce_sum(self, numbers: "torch.Tensor") -> "torch.Tensor":
        """The sum over all ranks of a CPU tensor, any shape and dtype."""

    def adjacent(self, size: int) -> Any:
        """The process group of `size` adjacent ranks that this one is in: 0 to size - 1, and so on. All ranks call it.

        Args:
            size: divides the number of ranks.
        """

    def agreed_stop(self, stop: StopRequest) -> StopRequest:
        """A request that all ranks see together: a signal to one of them stops all, at the same place."""

    def begin_attempt(self) -> None:
        """Begin a pass in which memory may run out. All ranks end it with a collective, so that none ends it alone."""

    def reported_out_of_memory(self, error: BaseException) -> bool:
        """Whether an error says no more than that another rank is lost, and that rank's memory ran out."""

    def end_out_of_memory(self, what: str, error: str, hint: str, next_start: dict[str, int]) -> NoReturn:
        """End the run on all ranks after memory ran out on one; see OutOfMemory for the arguments.

        Called by the rank that it ran out on, and by those that `reported_out_of_memory` tells of it, whose arguments
        are not used. Returns when the state is saved, by raising.

        Raises:
            MachineError: always.
        """

    def save_state_with(self, saver: StateSaver | None) -> None:
        """Have this saver write the state when memory runs out on a rank; None: there is no state to save."""


class SingleProcess:
    """The only process of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    sharded: bool = False
    is_main: bool = True

    def broadcast(self, value: Any) -> Any:
        """The value."""
        return value

    def all_reduce_sum(self, numbers: "torch.Tensor") -> "torch.Tensor":
        """The same tensor."""
        return numbers

    def adjacent(self, size: int) -> Any:
        """There is no process group."""

    def agreed_stop(self, stop: StopRequest) -> StopRequest:
        """The same request."""
        return stop

    def begin_attempt(self) -> None:
        """Nothing to agree on."""

    def reported_out_of_memory(self, error: BaseException) -> bool:
        """There is no other rank."""
        return False

    def end_out_of_memory(self, what: str, error: str, hint: str, next_start: dict[str, int]) -> NoReturn:
        """End the run."""
        raise MachineError(f"{what}\n{error}".rstrip(), hint=hint)

    def save_state_with(self, saver: StateSaver | None) -> None:
        """Memory that runs out ends no pass here: it is begun again with a smaller budget."""


SINGLE_PROCESS = SingleProcess()


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """Which rank a process is, as torchrun, Slurm or rank 0 says through the environment."""

    rank: int
    size: int
    local_rank: int


def rank_info() -> RankInfo | None:
    """What RANK, WORLD_SIZE and LOCAL_RANK say; None for a single process.

    Raises:
        ConfigError: the variables are no numbers, or do not fit together.
    """
    given = {name: os.environ.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        rank, size, local_rank = (int(value) for value in given.values())
    except ValueError:
        raise ConfigError(f"the environment says {given}: these must be numbers") from None
    if size <= 1:
        return None
    if not (0 <= rank < size and 0 <= local_rank < size):
        raise ConfigError(f"the environment says RANK {rank} and LOCAL_RANK {local_rank} of WORLD_SIZE {size}")
    return RankInfo(rank=rank, size=size, local_rank=local_rank)


def on_cuda(device: str) -> bool:
    """Whether a device setting means CUDA on this machine."""
    if device != "auto":
        return device.startswith("cuda")
    import torch

    return torch.cuda.is_available()
