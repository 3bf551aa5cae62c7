"""Kept states while they are being computed: a file for each rank, and last the column that tells that they stand."""

from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from critic_train.data.spool import ColumnWriter, Spool, bytes_of
from critic_train.distributed.ranks import ALONE, Ranks
from critic_train.model.inputs import ModelInput
from critic_train.rollouts import Rollouts
from critic_train.run.durable import write_json
from critic_train.run.storage import File, remove, rename, sync_directory
from critic_train.training.kept_states import FILES, ROW_BITS, ROWS, STATE_BYTES, file_of

Computed = tuple[ModelInput, NDArray[np.float32]]
"""A micro-batch and its states, on the CPU."""


class Share(NamedTuple):
    """What one rank has computed of some rollouts.

    Attributes:
        rows: int64 [T], numbers in `ROWS`, of all ranks together.
        end: rows in this rank's file behind it.
    """

    rows: NDArray[np.int64]
    end: int


class StatesWriter:
    """Kept states while they are being computed; they stand when the `with` block ends without an error on all ranks.

    Args:
        spool: whose rollouts these are.
        hidden_size: of a state.
        read_only: see KeptStates.
        ranks: which all write, each to its own file; rank 0 writes `ROWS`.
    """

    def __init__(self, spool: Spool, hidden_size: int, *, read_only: bool, ranks: Ranks = ALONE) -> None:
        self._spool = spool
        self._stride = STATE_BYTES * hidden_size
        self._read_only = read_only
        self._ranks = ranks
        self._count = 0
        self._target = file_of(spool, ranks.rank)
        self._temporary = self._target.with_name(f".{self._target.name}.tmp")
        self._rows: ColumnWriter | None = spool.new_column(ROWS, np.int64) if ranks.leads else None
        self._file: File | None = None

    def __enter__(self) -> "StatesWriter":
        self._file = File(self._temporary, "create")
        if self._rows is not None:
            self._rows.__enter__()
        return self

    def write(self, rollouts: Rollouts, parts: Iterator[Computed]) -> Share:
        """Write this rank's states of some rollouts; until `keep` they may be written again. All ranks call it.

        Args:
            rollouts: the rollouts, the same on all ranks.
            parts: every micro-batch of this rank's share of them, with its states on the CPU.
        """
        assert self._file is not None
        rows = np.zeros(len(rollouts.input_ids), dtype=np.int64)  # 1 more than the number: ranks' are summed
        first, count = (self._ranks.rank << ROW_BITS) + 1, self._count
        for batch, states in parts:
            if self._read_only:
                rows[batch.tokens] = first + count + batch.pair.cpu().numpy()
            else:
                rows[batch.all_tokens] = first + count + batch.where
            self._file.write_at(bytes_of(np.ascontiguousarray(states).reshape(-1)), count * self._stride)
            count += len(states)
        return Share(self._ranks.total(torch.from_numpy(rows)).numpy() - 1, count)

    def keep(self, index: NDArray[np.int64], share: Share) -> None:
        """Go on behind what was written.

        Args:
            index: int64 [n], the rollouts' places in the spool.
            share: what `write` gave.
        """
        self._count = share.end
        if self._rows is not None:
            self._rows.write(index, share.rows)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        try:
            with self._file:
                if error is None:
                    self._file.truncate(self._count * self._stride)
                    self._file.sync()
            if error is None:
                self._stand()
        except BaseException as fault:
            if self._rows is not None:
                self._rows.__exit__(type(fault), fault, fault.__traceback__)
            raise
        finally:
            remove(self._temporary)
        if self._rows is not None:  # what tells that the states stand comes last
            self._rows.__exit__(kind, error, trace)

    def _stand(self) -> None:
        rename(self._temporary, self._target)
        sync_directory(self._target.parent)
        counts = torch.zeros(self._ranks.size, dtype=torch.int64)
        counts[self._ranks.rank] = self._count
        counts = self._ranks.total(counts)  # and all files are there
        if self._ranks.leads:
            write_json(self._spool.directory / FILES, {"rows": counts.tolist()})
