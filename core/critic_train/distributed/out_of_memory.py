"""How a run on several ranks ends when memory runs out on one of them.

The others hang in a collective that this rank will never join, and gloo offers no way to call that off. So a thread
beside the main one of every rank watches the store. When a rank reports that memory ran out, and all have begun the
pass in which it happened, weights and moments are those of the last optimizer step on every rank: these threads write
them, rank 0's commits the checkpoint, and then all ranks end.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from typing import Any, NoReturn

import torch

from critic_train.distributed.rank_errors import looks_lost
from critic_train.distributed.ranks import OutOfMemory, StateSaver
from critic_train.distributed.run_store import GRACE_SECONDS, POLL_SECONDS, STORE_GONE, RunStore
from critic_train.errors import MachineError, first_line

WATCH_SECONDS = 0.5
"""How often the watching thread asks the store."""
PROGRESS_SECONDS = 60.0
"""How long a rank may take to write one tensor of its part before it is given up."""
LEAVE_SECONDS = 4.0
"""How long a main thread may take to notice that the run has ended before its process is ended."""

REPORT = "oom"
END = "oom/end"
DONE = "done"


class OutOfMemoryWatch:
    """Watches for memory that runs out on a rank, and ends the run then.

    Args:
        store: of the run.
        abort: has collectives of NCCL that hang fail; None on CPUs.

    Attributes:
        saver: writes the state when memory runs out; None while there is nothing to save.
        over: set when this rank has left the run.
    """

    def __init__(self, store: RunStore, abort: Callable[[], None] | None) -> None:
        self._store, self._abort = store, abort
        self.saver: StateSaver | None = None
        self.over = threading.Event()
        self._attempt = 0
        self._attempt_event: torch.cuda.Event | None = None
        self._device: int | None = None
        self._end: list[str] | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def begin_attempt(self) -> None:
        """Tell the other ranks that this one has finished all earlier passes, and begins the next one."""
        self._attempt += 1
        if self._abort is not None:
            self._device, self._attempt_event = torch.cuda.current_device(), torch.cuda.current_stream().record_event()
        self._store.write(f"attempt/{self._store.rank}", self._attempt)

    def reported(self, error: BaseException) -> bool:
        """Whether an error here follows from another rank whose memory ran out in the same attempt.

        Args:
            error: raised here. One that says that a connection was lost is given GRACE_SECONDS for the report to come.
        """
        if self._end is not None and looks_lost(error):
            return True
        until = time.monotonic() + (GRACE_SECONDS if looks_lost(error) else 0.0)
        try:
            while (report := self._report()) is None or report.attempt != self._attempt:
                if self._store.has_error() or time.monotonic() >= until:
                    return False
                time.sleep(POLL_SECONDS)
        except STORE_GONE:
            return False
        return True

    def end(self, what: str, error: str, hint: str, next_start: dict[str, int]) -> NoReturn:
        """Report that memory ran out here, unless another rank has; wait until the run has ended, and raise why.

        Args:
            what: the message where nothing could be saved.
            error: torch's, from this rank.
            hint: what to do about it.
            next_start: what the run remembers for its next start, as in `token_budget.json`.

        Raises:
            MachineError: always.
        """
        report = OutOfMemory(
            rank=self._store.rank, attempt=self._attempt, what=what, error=error, hint=hint, next_start=next_start
        )
        try:
            if self._end is None:
                self._store.write_once(REPORT, asdict(report))
            while self._end is None:
                self._report()  # raises where rank 0 is gone
                if not self._thread.is_alive() and self._end is None:
                    raise MachineError(f"{what}\n{error}", hint=hint)
                time.sleep(POLL_SECONDS)
        except STORE_GONE as lost:
            raise self._store.cause_of(lost) from lost
        raise MachineError(self._end[0], hint=self._end[1])

    def _report(self) -> OutOfMemory | None:
        record = self._store.read(REPORT)
        return None if record is None else OutOfMemory(**record)

    def _watch(self) -> None:
        """Thread: save the state and end where memory ran out on a rank; on GPUs, end collectives of lost partners."""
        while not self.over.wait(WATCH_SECONDS):
            try:
                report = self._report()
                failed = self._abort is not None and self._store.has_error()
            except STORE_GONE:
                report, failed = None, True
            if report is not None:
                with suppress(*STORE_GONE):
                    self._save_and_leave(report)
                return
            if failed:
                if self._abort is not None and not self.over.wait(GRACE_SECONDS):
                    self._abort()  # NCCL would wait for TIMEOUT
                return

    def _save_and_leave(self, report: OutOfMemory) -> None:
        """Write this rank's part of the state, wait until rank 0 has ended the run, and wake the main thread."""
        store, is_main = self._store, self._store.rank == 0
        # Nothing here may take part in a collective: the main threads of the other ranks hang in one.
        with self._beside_the_main_stream():
            if is_main:
                self._finish(report)
            else:
                self._write_part(report)
        while (end := store.read(END)) is None:
            time.sleep(POLL_SECONDS)
        store.write(f"{REPORT}/left/{store.rank}", True)
        until = time.monotonic() + LEAVE_SECONDS  # rank 0 keeps the store until all have read this
        while is_main and time.monotonic() < until and not all(map(self._has_left, range(store.size))):
            time.sleep(POLL_SECONDS)
        self._end = end
        if self._abort is not None:
            self._abort()
        if not self.over.wait(LEAVE_SECONDS) and not is_main:
            # The main thread hangs in a collective that gloo cannot call off. This wakes rank 0's, too.
            os._exit(1)

    def _has_left(self, rank: int) -> bool:
        return self._store.read(f"{REPORT}/left/{rank}") is not None

    def _write_part(self, report: OutOfMemory) -> None:
        key = f"{REPORT}/part/{self._store.rank}"
        written = 0

        def report_progress() -> None:
            nonlocal written
            written += 1
            self._store.write(key, written)

        try:
            self._store.wait_for(lambda rank: self._has_begun(rank, report.attempt))
            if self.saver is not None:
                self.saver.write_part(report_progress)
            self._store.write(key, DONE)
        except Exception as error:
            self._store.write(key, f"rank {self._store.rank}: {first_line(error)}")

    def _finish(self, report: OutOfMemory) -> None:
        error = report.error.strip()[:200]
        try:
            what, hint = report.what, report.hint
            if self.saver is not None:
                what, hint = self.saver.finish(report, lambda: self._wait_for_parts(report))
        except Exception as failure:
            what = f"{report.what}; the last step could not be saved: {first_line(failure)}"
        self._store.write(END, [f"{what}\n" + (f"rank {report.rank}: " if self._store.size > 1 else "") + error, hint])

    def _wait_for_parts(self, report: OutOfMemory) -> None:
        """Wait until all other ranks have written their parts.

        Raises:
            MachineError: one cannot, is lost, or makes no progress.
        """
        store = self._store
        store.wait_for(lambda rank: self._has_begun(rank, report.attempt))
        seen: dict[int, Any] = {}
        until = time.monotonic() + PROGRESS_SECONDS
        while any(seen.get(rank) != DONE for rank in range(1, store.size)):
            store.raise_if_lost()
            now = {rank: store.read(f"{REPORT}/part/{rank}") for rank in range(1, store.size)}
            failed = next((value for value in now.values() if isinstance(value, str) and value != DONE), None)
            if failed is not None:
                raise MachineError(failed)
            if now != seen:
                seen, until = now, time.monotonic() + PROGRESS_SECONDS
            elif time.monotonic() > until:
                waiting = ", ".join(str(rank) for rank, value in seen.items() if value != DONE)
                raise MachineError(f"rank {waiting} has made no progress for {PROGRESS_SECONDS:g} seconds")
            time.sleep(POLL_SECONDS)

    def _has_begun(self, rank: int, attempt: int) -> bool:
        begun = self._store.read(f"attempt/{rank}")
        return begun is not None and begun >= attempt

    def _beside_the_main_stream(self) -> AbstractContextManager[Any]:
        """On a GPU, a stream that does not wait for collectives that hang, but for the last optimizer step."""
        if self._device is None or self._attempt_event is None:
            return nullcontext()
        torch.cuda.set_device(self._device)
        stream = torch.cuda.Stream()
        stream.wait_event(self._attempt_event)
        return torch.cuda.stream(stream)
