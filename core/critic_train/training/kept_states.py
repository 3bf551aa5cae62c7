"""Hidden states of a frozen trunk, kept on disk: each position that was computed once, whoever shares it.

Each rank writes the states of its share of the rollouts to a file of its own, and every rank maps them all. `ROWS` is a
column of the spool that says, for every token, which row of which file holds its state; it is written last, so that
where it stands the states do. Files are mapped into memory: what is read lately stays at hand and nothing has to fit.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from critic_train.data.spool import Spool
from critic_train.json_files import read_object
from critic_train.model.inputs import ModelInput
from critic_train.rollouts import Rollouts, offsets_of
from critic_train.run.storage import remove

ROWS = "state-rows"
FILES = "states.json"
"""How many rows each file has."""
NOT_KEPT = -1
ROW_BITS = 40
"""A token's number in `ROWS` is its row in a file, and above these bits the file."""
STATE_BYTES, ROW_BYTES = 4, 8
"""Of a number of a state (float32), and of a token's row."""


def file_of(spool: Spool, rank: int) -> Path:
    """Where a rank keeps its states."""
    return spool.directory / f"states-{rank:05d}"


@dataclass(frozen=True, slots=True)
class KeptStates:
    """The states of some rollouts of a spool.

    Attributes:
        spool: whose rollouts these are.
        files: float32 [K, hidden_size] each, mapped from disk; as many as ranks have written.
        read_only: whether only states that are read are kept, for the head; else those of every position.
    """

    spool: Spool
    files: list[NDArray[np.float32]]
    read_only: bool

    def given_to(self, batch: ModelInput, rollouts: Rollouts) -> ModelInput:
        """A micro-batch with its states.

        Args:
            batch: laid out.
            rollouts: the mini-batch it is a part of, out of the spool.
        """
        if self.read_only:
            rows = np.full(len(batch.read), NOT_KEPT, dtype=np.int64)
            rows[batch.pair.cpu().numpy()] = self._rows(rollouts, batch.tokens)
        else:
            rows = np.full(batch.trunk_arguments["input_ids"].numel(), NOT_KEPT, dtype=np.int64)
            rows[batch.where] = self._rows(rollouts, batch.all_tokens)
        return replace(batch, states=torch.from_numpy(self._taken(rows)).to(batch.read.device, non_blocking=True))

    def _rows(self, rollouts: Rollouts, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers in `ROWS` of some tokens of a mini-batch."""
        if not len(tokens):
            return tokens
        owner = np.searchsorted(rollouts.offsets, tokens, side="right") - 1
        present, owner = np.unique(owner, return_inverse=True)
        index = self.spool.places(rollouts.row[present])
        rows = self.spool.read_column(ROWS, np.int64, index)
        starts = offsets_of(self.spool.lengths[index])[:-1]
        return rows[starts[owner] + tokens - rollouts.offsets[present][owner]]  # type: ignore[no-any-return]

    def _taken(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32 [len(rows), hidden_size]; 0 for padding, to which nobody attends."""
        files, places = rows >> ROW_BITS, rows & ((1 << ROW_BITS) - 1)
        numbers = np.unique(files).tolist()
        if len(numbers) == 1 and numbers[0] >= 0:
            return np.asarray(self.files[numbers[0]][places])
        states = np.zeros((len(rows), self.files[0].shape[1]), dtype=np.float32)
        for number in numbers:
            if number >= 0:
                states[files == number] = self.files[number][places[files == number]]
        return states


def open_states(spool: Spool, hidden_size: int, *, read_only: bool) -> KeptStates | None:
    """The states of a spool's rollouts, None where none stand."""
    if not spool.has_column(ROWS):
        return None
    try:
        counts = [int(count) for count in read_object(spool.directory / FILES)["rows"]]
        files = [_mapped(file_of(spool, rank), count, hidden_size) for rank, count in enumerate(counts)]
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return KeptStates(spool, files, read_only)


def _mapped(file: Path, count: int, hidden_size: int) -> NDArray[np.float32]:
    """Raises OSError or ValueError where the file is missing or has another size."""
    if file.stat().st_size != count * hidden_size * STATE_BYTES:
        raise ValueError(f"{file} has another size")
    if count == 0:  # which cannot be mapped
        return np.zeros((0, hidden_size), dtype=np.float32)
    return np.memmap(file, dtype=np.float32, mode="r", shape=(count, hidden_size))


def clear_states(spool: Spool) -> None:
    """Remove what an earlier start has left, of however many ranks."""
    spool.drop_column(ROWS)
    for pattern in ("states*", ".states*"):
        for file in spool.directory.glob(pattern):
            remove(file)
