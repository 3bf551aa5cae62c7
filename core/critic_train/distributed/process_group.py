"""Several ranks: a process group of torch.distributed, and a store through which they exchange what they decide.

What is computed together goes through collectives (gloo on CPUs, NCCL between GPUs). What rank 0 decides, and the
error that ends a run, go through the store: waiting for those costs nothing and has no time limit, while a collective
that takes longer than TIMEOUT means that a rank is stuck.

Memory that runs out on one rank leaves the others in a collective that it will never join, and gloo offers no way to
call that off. So a thread beside the main one of every rank watches the store. When a rank reports it, and all have
begun the pass in which it happened, weights and moments are those of the last optimizer step on every rank: these
threads write them, rank 0's commits the checkpoint, and then all ranks end.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from critic_train.distributed.launch import Workers, open_store
from critic_train.distributed.rank_errors import as_error, as_record, looks_lost
from critic_train.distributed.ranks import OutOfMemory, RankInfo, StateSaver, on_cuda
from critic_train.errors import MachineError, first_line
from critic_train.stopping import StopRequest

TIMEOUT = timedelta(minutes=10)
"""For a rank to join, for any one collective, and for a rank to begin the pass in which memory ran out."""

POLL_SECONDS = 0.05
WATCH_SECONDS = 0.5
"""How often the watching thread asks the store."""
GRACE_SECONDS = 5.0
"""How long the cause of a lost connection is looked for before it is called unknown."""
PROGRESS_SECONDS = 60.0
"""How long a rank may take to write one tensor of its part before it is given up."""
LEAVE_SECONDS = 4.0
"""How long a main thread may take to notice that the run has ended before its process is ended."""

ERROR = "error"
OOM = "oom"
OOM_END = "oom/end"
DONE = "done"


class ProcessGroup:
    """The ranks of a run, joined from `with` to its end; see Ranks.

    Args:
        info: which rank this process is, where the environment says so; otherwise this is rank 0 and starts `workers`.
        workers: the ranks that rank 0 starts; none where the environment names the ranks.
        device: the device setting, for the choice of the backend.

    Raises:
        MachineError: a rank does not come within TIMEOUT.
    """

    def __init__(self, info: RankInfo | None, workers: Workers, device: str) -> None:
        self._workers = workers
        self._starts_workers = info is None
        self.sharded = True
        info = info or RankInfo(rank=0, size=workers.size, local_rank=0)
        self.rank, self.size, self.local_rank = info.rank, info.size, info.local_rank
        self._cuda = on_cuda(device)
        self._broadcasts = 0
        self._attempt = 0
        self._attempt_event: torch.cuda.Event | None = None
        self._device: int | None = None
        self._saver: StateSaver | None = None
        self._end: list[str] | None = None
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._aborting = threading.Lock()
        self._store: Store

    def __enter__(self) -> "ProcessGroup":
        try:
            self._store = open_store(self.rank, self.size, self._workers if self._starts_workers else None, TIMEOUT)
            self._join()
        except (dist.DistError, RuntimeError) as error:
            raise self._lost_error(error) from error
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if error is None:
            self.all_reduce_max(0)  # a barrier: nobody leaves before all have come to the end
            dist.destroy_process_group()
            return
        cause = self._lost_error(error) if looks_lost(error) else error
        if cause is error:
            self._publish(error)
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
            self._store.set(key, json.dumps(value))
            return value
        while (content := self._read(key)) is None:
            record = self._read(ERROR)
            if record is not None:
                raise as_error(record)
            time.sleep(POLL_SECONDS)
        return content

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

    def agreed_stop(self, stop: StopRequest) -> StopRequest:
        """A request that all ranks see together."""
        return AgreedStop(own=stop, ranks=self)

    def begin_attempt(self) -> None:
        """Say that this rank is through with all that came before, and begins the next pass."""
        self._attempt += 1
        if self._cuda:
            self._device, self._attempt_event = torch.cuda.current_device(), torch.cuda.current_stream().record_event()
        self._store.set(f"attempt/{self.rank}", str(self._attempt))

    def save_state_with(self, saver: StateSaver | None) -> None:
        """Have this saver write the state when memory runs out on a rank."""
        self._saver = saver

    def reported_out_of_memory(self, error: BaseException) -> bool:
        """Whether a partner is gone because another rank's memory ran out in the same attempt."""
        until = time.monotonic() + (GRACE_SECONDS if looks_lost(error) else 0.0)
        if self._end is not None and looks_lost(error):
            return True
        try:
            while (report := self._report()) is None or report.attempt != self._attempt:
                if self._read(ERROR) is not None or time.monotonic() >= until:
                    return False
                time.sleep(POLL_SECONDS)
        except (dist.DistError, RuntimeError):
            return False  # rank 0 is gone, and the store with it
        return True

    def end_out_of_memory(self, what: str, error: str, hint: str, next_start: dict[str, int]) -> NoReturn:
        """Report that memory ran out here, unless another rank has; wait for the end of the run, and raise it."""
        report = OutOfMemory(
            rank=self.rank, attempt=self._attempt, what=what, error=error, hint=hint, next_start=next_start
        )
        try:
            if self._end is None:
                self._store.compare_set(OOM, "", json.dumps(asdict(report)))  # the first report stands
            while self._end is None:
                self._store.check([OOM])  # raises where rank 0 is gone
                if not self._watcher.is_alive() and self._end is None:
                    raise MachineError(f"{what}\n{error}", hint=hint)
                time.sleep(POLL_SECONDS)
        except (dist.DistError, RuntimeError) as lost:
            raise self._lost_error(lost) from lost
        raise MachineError(self._end[0], hint=self._end[1])

    def _join(self) -> None:
        """Wait until all ranks are here, and make their process group."""
        self._store.set(f"here/{self.rank}", "1")
        self._wait_for(
            lambda rank: self._store.check([f"here/{rank}"]),
            hint="start the same command on every machine, and let them reach MASTER_ADDR",
        )
        # NCCL's watchdog may end a group that another rank has left, but not this process, as torchrun asks it to.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "2"
        # Sums on the CPU (stop requests, figures) go through gloo even where weights are on GPUs.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self._cuda else "gloo",
            store=PrefixStore("group", self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=TIMEOUT,
        )

    def _wait_for(self, arrived: Callable[[int], bool], hint: str) -> None:
        """Wait until something holds of every rank; a rank that is lost or meets an error is reported at once."""
        until = time.monotonic() + TIMEOUT.total_seconds()
        missing = list(range(self.size))
        while missing := [rank for rank in missing if not arrived(rank)]:
            self._raise_if_lost()
            if time.monotonic() > until:
                raise MachineError(
                    f"only {self.size - len(missing)} of {self.size} ranks came within {TIMEOUT}; missing: {missing}",
                    hint=hint,
                )
            time.sleep(POLL_SECONDS)

    def _raise_if_lost(self) -> None:
        """Raise the error of a rank that has ended."""
        lost = self._workers.lost_error()
        if lost is not None:
            raise lost
        record = self._read(ERROR)
        if record is not None:
            raise as_error(record)

    def _read(self, key: str) -> Any:
        """What a key of the store holds, as JSON; None where it holds nothing."""
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _publish(self, error: BaseException) -> None:
        """Send an error to the others; the first of all stands."""
        try:
            self._store.compare_set(ERROR, "", json.dumps(as_record(error, self.rank)))
        except (dist.DistError, RuntimeError):
            return  # rank 0 is gone, and the store with it: nobody is left to read

    def _lost_error(self, error: BaseException) -> BaseException:
        """The error of another rank that is behind a lost connection."""
        until = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < until:
            try:
                record = self._read(ERROR)
            except (AttributeError, dist.DistError):
                break  # the store is gone with rank 0, or was never there
            if record is not None and record["rank"] != self.rank:
                return as_error(record)
            lost = self._workers.lost_error()
            if lost is not None:
                return lost
            time.sleep(POLL_SECONDS)
        return MachineError(
            f"rank {self.rank} of {self.size} lost contact with another rank: {first_line(error)[:300]}",
            hint="the other ranks' output tells why; the last checkpoint stands, the same command goes on from it",
        )

    def _report(self) -> OutOfMemory | None:
        record = self._read(OOM)
        return None if record is None else OutOfMemory(**record)

    def _watch(self) -> None:
        """Thread: save the state and end where memory ran out on a rank; on GPUs, end collectives of lost partners."""
        while not self._over.wait(WATCH_SECONDS):
            try:
                report = self._report()
                failed = self._cuda and self._read(ERROR) is not None
            except (dist.DistError, RuntimeError):
                report, failed = None, self._cuda  # rank 0 is gone
                if not failed:
                    return
            if report is not None:
                with suppress(dist.DistError, RuntimeError):  # rank 0 is gone, and the store with it
                    self._save_and_leave(report)
                return
            if failed and not self._over.wait(GRACE_SECONDS):
                self._abort()  # NCCL would wait for TIMEOUT
                return

    def _save_and_leave(self, report: OutOfMemory) -> None:
        """Write this rank's part of the state, wait until rank 0 has ended the run, and wake the main thread."""
        with self._beside_the_main_stream():
            if self.is_main:
                self._finish(report)
            else:
                self._write_part(report)
        while (end := self._read(OOM_END)) is None:
            time.sleep(POLL_SECONDS)
        self._store.set(f"{OOM}/left/{self.rank}", "1")
        until = time.monotonic() + LEAVE_SECONDS  # rank 0 keeps the store until all have read this
        while self.is_main and time.monotonic() < until and not all(map(self._has_left, range(self.size))):
            time.sleep(POLL_SECONDS)
        self._end = end
        if self._cuda:
            self._abort()
        if not self._over.wait(LEAVE_SECONDS) and not self.is_main:
            # The main thread hangs in a collective that gloo cannot call off. This wakes rank 0's, too.
            os._exit(1)

    def _has_left(self, rank: int) -> bool:
        return self._read(f"{OOM}/left/{rank}") is not None

    def _write_part(self, report: OutOfMemory) -> None:
        key = f"{OOM}/part/{self.rank}"
        written = 0

        def report_progress() -> None:
            nonlocal written
            written += 1
            self._store.set(key, json.dumps(written))

        try:
            self._wait_for(lambda rank: self._has_begun(rank, report.attempt), hint="")
            if self._saver is not None:
                self._saver.write_part(report_progress)
            self._store.set(key, json.dumps(DONE))
        except Exception as error:
            self._store.set(key, json.dumps(f"rank {self.rank}: {first_line(error)}"))

    def _finish(self, report: OutOfMemory) -> None:
        whose = f"rank {report.rank}: {report.error.strip()[:200]}" if self.size > 1 else report.error.strip()[:200]
        try:
            if self._saver is None:
                end = report.what, report.hint
            else:
                end = self._saver.finish(report, lambda: self._wait_for_parts(report))
        except Exception as error:
            end = f"{report.what}; the last step could not be saved: {first_line(error)}", report.hint
        self._store.set(OOM_END, json.dumps([f"{end[0]}\n{whose}", end[1]]))

    def _wait_for_parts(self, report: OutOfMemory) -> None:
        """Wait until all other ranks have written their parts.

        Raises:
            MachineError: one cannot, is lost, or makes no progress.
        """
        self._wait_for(lambda rank: self._has_begun(rank, report.attempt), hint="")
        seen: dict[int, Any] = {}
        until = time.monotonic() + PROGRESS_SECONDS
        while any(seen.get(rank) != DONE for rank in range(1, self.size)):
            self._raise_if_lost()
            now = {rank: self._read(f"{OOM}/part/{rank}") for rank in range(1, self.size)}
            failed = next((value for value in now.values() if isinstance(value, str) and value != DONE), None)
            if failed is not None:
                raise MachineError(failed)
            if now != seen:
                seen, until = now, time.monotonic() + PROGRESS_SECONDS
            elif time.monotonic() > until:
                waiting = ", ".join(str(rank) for rank, value in seen.items() if value != DONE)
                raise MachineError(f"nothing was heard of rank {waiting} for {PROGRESS_SECONDS:g} seconds")
            time.sleep(POLL_SECONDS)

    def _has_begun(self, rank: int, attempt: int) -> bool:
        begun = self._read(f"attempt/{rank}")
        return begun is not None and begun >= attempt

    def _beside_the_main_stream(self) -> AbstractContextManager[Any]:
        """On a GPU, a stream that does not wait for collectives that hang, but for the last optimizer step."""
        if self._device is None or self._attempt_event is None:
            return nullcontext()
        torch.cuda.set_device(self._device)
        stream = torch.cuda.Stream()
        stream.wait_event(self._attempt_event)
        return torch.cuda.stream(stream)

    def _abort(self) -> None:
        """Have NCCL's collectives that wait in the process group fail; gloo has nothing of the kind."""
        with self._aborting:
            if dist.is_initialized() and dist.group.WORLD is not None:
                dist.group.WORLD.abort()


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
