"""Several ranks: a process group of torch.distributed, and a store through which they exchange what they decide.

What is computed together goes through collectives (gloo on CPUs, NCCL between GPUs). What rank 0 decides, and the
error that ends a run, go through the store: waiting for those has no time limit, while a collective that takes longer
than TIMEOUT means that a rank is stuck.
"""

import os
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from critic_train.distributed.launch import Workers, open_store
from critic_train.distributed.out_of_memory import OutOfMemoryWatch
from critic_train.distributed.rank_errors import looks_lost
from critic_train.distributed.ranks import RankInfo, StateSaver, on_cuda
from critic_train.distributed.run_store import POLL_SECONDS, STORE_GONE, TIMEOUT, RunStore, lost_contact
from critic_train.stopping import StopRequest


class ProcessGroup:
    """The ranks of a run, joined from `with` to its end; see Ranks.

    Args:
        info: which rank this process is, where the environment says so; otherwise this is rank 0 and starts `workers`.
        workers: the ranks that rank 0 starts; none where the environment names the ranks.
        device: the device setting, for the choice of the backend.
        stop: checked while `workers` come up.

    Raises:
        MachineError: a rank does not come within TIMEOUT.
        Stopped: asked to stop before all workers were there.
    """

    def __init__(self, info: RankInfo | None, workers: Workers, device: str, stop: StopRequest | None = None) -> None:
        self._workers, self._stop = workers, stop or StopRequest()
        self._starts_workers = info is None
        self.sharded = True
        info = info or RankInfo(rank=0, size=workers.size, local_rank=0)
        self.rank, self.size, self.local_rank = info.rank, info.size, info.local_rank
        self._cuda = on_cuda(device)
        self._broadcasts = 0
        self._adjacent: dict[int, dist.ProcessGroup] = {}
        self._aborting = threading.Lock()
        self._store: RunStore
        self._watch: OutOfMemoryWatch

    def __enter__(self) -> "ProcessGroup":
        try:
            store = open_store(self.rank, self.size, self._workers if self._starts_workers else None, TIMEOUT)
        except STORE_GONE as error:
            raise lost_contact(self.rank, self.size, error) from error
        self._store = RunStore(store, self.rank, self.size, self._workers)
        try:
            self._join()
        except STORE_GONE as error:
            raise self._store.cause_of(error) from error
        self._watch = OutOfMemoryWatch(self._store, self._abort if self._cuda else None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.over.set()
        if error is None:
            self.all_reduce_max(0)  # a barrier: a rank that left earlier would fail the collectives of the others
            dist.destroy_process_group()
            return
        cause = self._store.cause_of(error) if looks_lost(error) else error
        if cause is error:
            self._store.publish_error(error)
        self._abort()
        dist.destroy_process_group()
        if cause is not error:
            raise cause from None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        key = f"broadcast/{self._broadcasts}"
        self._broadcasts += 1
        if self.is_main:
            self._store.write(key, [value])
            return value
        while (content := self._store.read(key)) is None:
            self._store.raise_if_lost()
            time.sleep(POLL_SECONDS)
        return content[0]

    def all_reduce_sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of a CPU tensor; a new tensor."""
        assert numbers.device.type == "cpu"
        numbers = numbers.clone()
        dist.all_reduce(numbers)
        return numbers

    def all_reduce_max(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        tensor = torch.tensor([number])
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def adjacent(self, size: int) -> dist.ProcessGroup:
        """The process group of `size` adjacent ranks that this one is in; the same at every call."""
        if size not in self._adjacent:
            # All that are left wait for each other here, where one that is lost is seen: by a group that is being made
            # it is not until the time limit.
            self.all_reduce_max(0)
            # Not by a DeviceMesh, whose groups do not take over the time limit.
            self._adjacent[size], _ = dist.new_subgroups(size, timeout=TIMEOUT)
        return self._adjacent[size]

    def agreed_stop(self, stop: StopRequest) -> StopRequest:
        """A request that all ranks see together."""
        return AgreedStop(own=stop, ranks=self)

    def begin_attempt(self) -> None:
        """Begin a pass in which memory may run out."""
        self._watch.begin_attempt()

    def reported_out_of_memory(self, error: BaseException) -> bool:
        """Whether an error here follows from another rank whose memory ran out in the same attempt."""
        return self._watch.reported(error)

    def end_out_of_memory(self, what: str, error: str, hint: str, next_start: dict[str, int]) -> NoReturn:
        """End the run on all ranks after memory ran out on one."""
        self._watch.end(what, error, hint, next_start)

    def save_state_with(self, saver: StateSaver | None) -> None:
        """Have this saver write the state when memory runs out on a rank."""
        self._watch.saver = saver

    def _join(self) -> None:
        """Wait until all ranks are here, and make their process group."""
        self._store.write(f"here/{self.rank}", True)
        self._store.wait_for(
            self._is_here,
            hint="start the same command on every machine, and let them reach MASTER_ADDR",
        )
        # NCCL's watchdog may end a group that another rank has left, but not this process, as torchrun asks it to.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "2"
        # Sums on the CPU (stop requests, figures) go through gloo even where weights are on GPUs.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self._cuda else "gloo",
            store=PrefixStore("group", self._store.own_connection()),
            rank=self.rank,
            world_size=self.size,
            timeout=TIMEOUT,
        )

    def _is_here(self, rank: int) -> bool:
        if self._starts_workers:  # elsewhere every rank gets the signal, and must not leave the others waiting
            self._stop.check()
        return self._store.read(f"here/{rank}") is not None

    def _abort(self) -> None:
        """Have NCCL's collectives that wait in the process group fail; gloo has nothing of the kind."""
        with self._aborting:
            if dist.is_initialized() and dist.group.WORLD is not None:
                for group in (*self._adjacent.values(), dist.group.WORLD):
                    group.abort()


@dataclass(slots=True, kw_only=True)
class AgreedStop(StopRequest):
    """A stop that all ranks see at the same place: `requested` changes only where all of them look.

    Attributes:
        own: this process's request.
        ranks: all ranks.
    """

    own: StopRequest
    ranks: ProcessGroup

    def look(self) -> bool:
        """Ask all ranks whether one was asked to stop; all ranks call this at the same places."""
        number = self.ranks.all_reduce_max(self.own.signal_number or 0)
        if number:
            self.signal_number = number
        return self.requested
