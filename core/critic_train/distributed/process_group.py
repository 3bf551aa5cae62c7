"""Several ranks: a process group of torch.distributed, and a store through which they tell each other things.

What is computed together goes through collectives (gloo on CPUs, NCCL between GPUs). What rank 0 decides, and the
fault that ends a run, go through the store: waiting for those costs nothing and has no time limit, while a collective
that takes longer than TIMEOUT means that a rank is stuck.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.distributed_c10d import PrefixStore, Store

from critic_train.distributed.launch import Workers, meet
from critic_train.distributed.rank_errors import as_error, as_record, looks_lost
from critic_train.distributed.ranks import RankInfo, Ranks
from critic_train.distributed.regrouping import Shortage, Spread
from critic_train.errors import MachineError, first_line
from critic_train.model.compute import on_cuda
from critic_train.stopping import StopRequest

TIMEOUT = timedelta(minutes=10)
"""For a rank to join, and for any one collective."""

POLL_SECONDS = 0.05
FAULT = "fault"
GRACE_SECONDS = 5.0
"""How long the cause of a lost connection is looked for before it is called unknown."""


class Group(Ranks):
    """The ranks of a run, joined from `with` to its end.

    Args:
        here: this process's place, where the environment tells it; otherwise this is rank 0 and starts `workers`.
        workers: the ranks that rank 0 starts; none where the environment tells the place.
        device: the device setting, for the choice of the backend.

    Raises:
        MachineError: a rank does not come within TIMEOUT.
    """

    def __init__(self, here: RankInfo | None, workers: Workers, device: str) -> None:
        self._workers = workers
        self._told_where = here is not None
        self.sharded = True
        here = here or RankInfo(rank=0, size=workers.size, local_rank=0)
        self.rank, self.size, self.local_rank = here.rank, here.size, here.local_rank
        self._cuda = on_cuda(device)
        self._told = 0
        self._over = threading.Event()
        self._store: Store
        self._shortage: Shortage
        self._spread = Spread()
        self._opened: int | None = None
        self._closing = threading.Lock()

    def __enter__(self) -> "Group":
        try:
            self._store = meet(self.rank, self.size, None if self._told_where else self._workers, TIMEOUT)
            self._shortage = Shortage(self._store, self.rank, self.size)
            self._open()
        except (dist.DistError, RuntimeError) as error:
            raise self._lost_error(error) from error
        if self._cuda:
            threading.Thread(target=self._abort_on_fault, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if error is None:
            self.largest(0)  # nobody leaves before all have come to the end
            dist.destroy_process_group()
            return
        cause = self._cause(error)
        if cause is error:
            self._publish(error)
        self._close(self._opened)
        if cause is not error:
            raise cause from None

    def spread(self, critic: torch.nn.Module, mesh: Any) -> None:
        """See Ranks."""
        self._spread.add(critic, mesh)

    def attempting(self) -> None:
        """See Ranks."""
        self._shortage.begin()

    def ran_out(self, error: BaseException, *, here: bool) -> str | None:
        """See Ranks."""
        if here:
            self._shortage.tell(str(error) or type(error).__name__)
        until = time.monotonic() + (GRACE_SECONDS if looks_lost(error) else 0.0)
        try:
            while (told := self._shortage.told()) is None:
                if self._published() is not None or self._workers.lost() or time.monotonic() >= until:
                    return None
                time.sleep(POLL_SECONDS)
        except (dist.DistError, RuntimeError):
            return None  # rank 0 is gone, and the store with it
        return told

    def meet_again(self) -> None:
        """See Ranks."""
        try:
            self._wait_for(self._shortage.has_begun, hint="")
            self._close(self._shortage.round)
            self._spread.let_go(torch.device("cuda", torch.cuda.current_device()) if self._cuda else None)
            self._shortage.round += 1
            self._open()
            self._spread.meet()
        except (dist.DistError, RuntimeError) as error:
            raise self._lost_error(error) from error

    def agreeing(self, stop: StopRequest) -> StopRequest:
        """See Ranks."""
        return AgreedStop(own=stop, group=self)

    def tell(self, value: Any) -> None:
        """See Ranks."""
        assert self.leads
        self._store.set(f"told/{self._told}", json.dumps(value))
        self._told += 1

    def hear(self) -> Any:
        """See Ranks."""
        assert not self.leads
        key = f"told/{self._told}"
        self._told += 1
        while not self._store.check([key]):
            fault = self._published()
            if fault is not None:
                raise as_error(fault)
            time.sleep(POLL_SECONDS)
        return json.loads(self._store.get(key))

    def total(self, numbers: torch.Tensor) -> torch.Tensor:
        """See Ranks."""
        assert numbers.device.type == "cpu"
        numbers = numbers.clone()
        dist.all_reduce(numbers)
        return numbers

    def total_of(self, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Ranks."""
        return self.total(torch.from_numpy(numbers)).numpy()

    def sum_gradients(self, modules: Sequence[torch.nn.Module], *, now: bool) -> None:
        """See Ranks."""
        from critic_train.model.fsdp import sum_gradients

        sum_gradients(modules, now=now)

    def full_precision_params(self, modules: Sequence[torch.nn.Module]) -> AbstractContextManager[None]:
        """See Ranks."""
        from critic_train.model.fsdp import full_precision_params

        return full_precision_params(modules)

    def reshard(self, modules: Sequence[torch.nn.Module]) -> None:
        """See Ranks."""
        from critic_train.model.fsdp import reshard

        reshard(modules)

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        tensor = torch.tensor([number])
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def _open(self) -> None:
        """Wait until all ranks are here, and make their process group: the first, or one after memory ran out."""
        number = self._shortage.round
        self._store.set(f"here/{number}/{self.rank}", "")
        self._wait_for(
            lambda rank: self._store.check([f"here/{number}/{rank}"]),
            hint="start the same command on every machine, and let them reach MASTER_ADDR",
        )
        # NCCL's watchdog may end a group that another rank has left, but not this process, as torchrun asks it to.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "2"
        # Sums on the CPU (stop flags, figures) go through gloo even where weights are on GPUs.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self._cuda else "gloo",
            store=PrefixStore(f"group/{number}", self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=TIMEOUT,
        )
        self._opened = number

    def _close(self, number: int | None) -> None:
        """End the process group of that number, if it is the one that stands; all who wait in it fail."""
        with self._closing:
            if number is not None and self._opened == number:
                self._opened = None
                dist.distributed_c10d._abort_process_group()

    def _wait_for(self, arrived: Callable[[int], bool], hint: str) -> None:
        """Wait until every rank is here, so that one that never comes is told of at once and by its number."""
        until = time.monotonic() + TIMEOUT.total_seconds()
        missing = list(range(self.size))
        while missing := [rank for rank in missing if not arrived(rank)]:
            lost = self._workers.lost()
            if lost is not None:
                raise lost
            fault = self._published()
            if fault is not None:
                raise as_error(fault)
            if time.monotonic() > until:
                raise MachineError(
                    f"only {self.size - len(missing)} of {self.size} ranks came within {TIMEOUT}; missing: {missing}",
                    hint=hint,
                )
            time.sleep(POLL_SECONDS)

    def _publish(self, error: BaseException) -> None:
        """Tell the others; the first fault of all stands."""
        try:
            self._store.compare_set(FAULT, "", json.dumps(as_record(error, self.rank)))
        except (dist.DistError, RuntimeError):
            return  # rank 0 is gone, and the store with it: nobody is left to hear

    def _cause(self, error: BaseException) -> BaseException:
        """The fault behind an error: another rank's where this one only met its absence."""
        if not looks_lost(error):
            return error
        return self._lost_error(error)

    def _lost_error(self, error: BaseException) -> BaseException:
        until = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < until:
            try:
                told = self._published()
            except (AttributeError, dist.DistError):
                break  # the store is gone with rank 0, or was never there
            if told is not None and told["rank"] != self.rank:
                return as_error(told)
            lost = self._workers.lost()
            if lost is not None:
                return lost
            time.sleep(POLL_SECONDS)
        first = first_line(error)[:300]
        return MachineError(
            f"rank {self.rank} of {self.size} lost contact with another rank: {first}",
            hint="the other ranks' output tells why; the last checkpoint stands, the same command goes on from it",
        )

    def _published(self) -> dict[str, Any] | None:
        return json.loads(self._store.get(FAULT)) if self._store.check([FAULT]) else None

    def _abort_on_fault(self) -> None:
        """On GPUs: a collective whose partner is gone waits for TIMEOUT; end it as soon as that is told."""
        while not self._over.wait(1.0):
            number = self._shortage.round
            try:
                told, short = self._published() is not None, self._shortage.may_part()
            except dist.DistError:
                told = True  # rank 0 is gone
            if told and not self._over.wait(GRACE_SECONDS):
                self._close(self._opened)
                return
            if short:
                self._close(number)


@dataclass(slots=True, kw_only=True)
class AgreedStop(StopRequest):
    """A stop that all ranks see at the same place: `requested` changes in `look` alone, which all must call.

    Attributes:
        own: this process's request.
        group: the ranks.
    """

    own: StopRequest
    group: Group

    def look(self) -> bool:
        """Ask all ranks whether somebody was asked to stop."""
        number = self.group.largest(self.own.signal_number or 0)
        if number:
            self.signal_number = number
        return self.requested
