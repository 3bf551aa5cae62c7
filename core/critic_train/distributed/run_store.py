"""The store that all ranks of a run share: JSON under keys, and the first error of any rank."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from critic_train.distributed.launch import Workers
from critic_train.distributed.rank_errors import as_error, as_record
from critic_train.errors import MachineError, first_line

TIMEOUT = timedelta(minutes=10)
"""For a rank to join, for any one collective, and for a rank to begin the pass in which memory ran out."""

POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0
"""How long the cause of a lost connection is looked for before it is called unknown."""

ERROR = "error"
STORE_GONE = (dist.DistError, RuntimeError)
"""What the store raises when rank 0, which holds it, has ended."""


class RunStore:
    """What the ranks of a run write for each other.

    Args:
        store: of torch.distributed.
        rank: this process's number.
        size: number of ranks.
        workers: the ranks that this process has started.
    """

    def __init__(self, store: Store, rank: int, size: int, workers: Workers) -> None:
        self.store, self.rank, self.size = store, rank, size
        self._workers = workers

    def own_connection(self) -> Store:
        """The same store by another connection, for calls that may wait: a call on this one would wait for them.

        So NCCL's first collective, in which a rank waits for rank 0's id, does not keep a thread from seeing errors.
        """
        store: Any = self.store
        connection: Store = store.clone()
        return connection

    def read(self, key: str) -> Any:
        """What a key holds; None where it holds nothing."""
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def write(self, key: str, value: Any) -> None:
        """Put something that JSON can hold under a key."""
        self.store.set(key, json.dumps(value))

    def write_once(self, key: str, value: Any) -> None:
        """The same, unless the key holds something: of several ranks the first stands."""
        self.store.compare_set(key, "", json.dumps(value))

    def publish_error(self, error: BaseException) -> None:
        """Send an error to the others; the first of all stands."""
        with suppress(*STORE_GONE):  # no other rank is left to read it
            self.write_once(ERROR, as_record(error, self.rank))

    def has_error(self) -> bool:
        """Whether a rank has published an error."""
        return self.read(ERROR) is not None

    def raise_if_lost(self) -> None:
        """Raise the error of a rank that has published one, or has ended."""
        lost = self._workers.lost_error()
        if lost is not None:
            raise lost
        record = self.read(ERROR)
        if record is not None:
            raise as_error(record)

    def wait_for(self, holds: Callable[[int], bool], hint: str = "") -> None:
        """Wait until something holds of every rank; a rank that is lost or meets an error is reported at once.

        Raises:
            CriticTrainError: of that rank; or it does not hold of all within TIMEOUT.
        """
        until = time.monotonic() + TIMEOUT.total_seconds()
        missing = list(range(self.size))
        while missing := [rank for rank in missing if not holds(rank)]:
            self.raise_if_lost()
            if time.monotonic() > until:
                raise MachineError(
                    f"only {self.size - len(missing)} of {self.size} ranks came within {TIMEOUT}; missing: {missing}",
                    hint=hint,
                )
            time.sleep(POLL_SECONDS)

    def cause_of(self, error: BaseException) -> BaseException:
        """The error of another rank that is behind a lost connection."""
        until = time.monotonic() + GRACE_SECONDS
        with suppress(*STORE_GONE):
            while time.monotonic() < until:
                record = self.read(ERROR)
                if record is not None and record["rank"] != self.rank:
                    return as_error(record)
                lost = self._workers.lost_error()
                if lost is not None:
                    return lost
                time.sleep(POLL_SECONDS)
        return lost_contact(self.rank, self.size, error)


def lost_contact(rank: int, size: int, error: BaseException) -> MachineError:
    """The error of a rank that cannot know what happened to another one."""
    return MachineError(
        f"rank {rank} of {size} lost contact with another rank: {first_line(error)[:300]}",
        hint="the other ranks' output says why; the last checkpoint is intact, and the same command goes on from it",
    )
