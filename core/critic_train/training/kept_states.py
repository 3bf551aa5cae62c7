"""Hidden states of a frozen trunk, kept on disk: each position that was computed once, whoever shares it.

`rows` is a column of the spool that says, for every token, which row of the file holds its state. The file is mapped
into memory, so what is read lately stays at hand and nothing has to fit.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from critic_train.data.spool import ColumnWriter, Spool, bytes_of
from critic_train.events import Event, Progress
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.freezing import upper_part_agrees
from critic_train.model.inputs import ModelInput
from critic_train.model.memory import in_memory, is_out_of_memory
from critic_train.model.microbatches import micro_batches
from critic_train.rollouts import Rollouts, offsets_of
from critic_train.run.storage import File, remove, rename
from critic_train.stopping import StopRequest
from critic_train.training.dataset import ROLLOUTS_AT_ONCE, RolloutSet

ROWS = "state-rows"
STATES = "states"
NOT_KEPT = -1
STATE_BYTES, ROW_BYTES = 4, 8
"""Of a number of a state (float32), and of a token's row."""
TOLERANCE = 1e-4
"""Largest difference of a hidden state, relative to the largest: right is exact, or a rounding."""

Computed = tuple[ModelInput, NDArray[np.float32]]
"""A micro-batch and its states, on the CPU."""


@dataclass(frozen=True, slots=True)
class KeptStates:
    """The states of some rollouts of a spool.

    Attributes:
        spool: whose rollouts these are.
        states: float32 [K, hidden_size], mapped from disk.
        read_only: whether only states that are read are kept, for the head; else those of every position.
    """

    spool: Spool
    states: NDArray[np.float32]
    read_only: bool

    def given_to(self, batch: ModelInput, rollouts: Rollouts) -> ModelInput:
        """A micro-batch with its states.

        Args:
            batch: laid out.
            rollouts: the mini-batch it is a part of, out of the spool.
        """
        if self.read_only:
            rows = np.empty(len(batch.read), dtype=np.int64)
            rows[batch.pair.cpu().numpy()] = self._rows(rollouts, batch.tokens)
            return replace(batch, states=self._taken(rows, batch))
        positions = batch.trunk_arguments["input_ids"].numel()
        rows = np.zeros(positions, dtype=np.int64)  # padding may have any state: nobody attends to it
        rows[batch.where] = self._rows(rollouts, batch.all_tokens)
        return replace(batch, states=self._taken(rows, batch))

    def _rows(self, rollouts: Rollouts, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the states of some tokens of a mini-batch."""
        owner = np.searchsorted(rollouts.offsets, tokens, side="right") - 1
        present, owner = np.unique(owner, return_inverse=True)
        index = self.spool.places(rollouts.row[present])
        rows = self.spool.read_column(ROWS, np.int64, index)
        starts = offsets_of(self.spool.lengths[index])[:-1]
        return rows[starts[owner] + tokens - rollouts.offsets[present][owner]]  # type: ignore[no-any-return]

    def _taken(self, rows: NDArray[np.int64], batch: ModelInput) -> torch.Tensor:
        return torch.from_numpy(self.states[rows]).to(batch.read.device, non_blocking=True)


class StatesWriter:
    """Kept states while they are being computed; they stand when the `with` block ends without an error.

    Args:
        spool: whose rollouts these are.
        read_only: see KeptStates.
    """

    def __init__(self, spool: Spool, *, read_only: bool) -> None:
        self._spool = spool
        self._read_only = read_only
        self._count = 0
        self._temporary = spool.directory / f".{STATES}.tmp"
        self._rows: ColumnWriter = spool.new_column(ROWS, np.int64)
        self._file: File | None = None

    def __enter__(self) -> "StatesWriter":
        self._file = File(self._temporary, "create")
        self._rows.__enter__()
        return self

    def add(
        self, index: NDArray[np.int64], rollouts: Rollouts, parts: Iterator[tuple[ModelInput, NDArray[np.float32]]]
    ) -> None:
        """Keep the states of some rollouts.

        Args:
            index: int64 [n], their places in the spool.
            rollouts: the rollouts.
            parts: every micro-batch of them, with its states on the CPU.
        """
        assert self._file is not None
        rows = np.full(len(rollouts.input_ids), NOT_KEPT, dtype=np.int64)
        for batch, states in parts:
            if self._read_only:
                rows[batch.tokens] = self._count + batch.pair.cpu().numpy()
            else:
                rows[batch.all_tokens] = self._count + batch.where
            self._file.write(bytes_of(np.ascontiguousarray(states).reshape(-1)))
            self._count += len(states)
        self._rows.write(index, rows)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()
        # The rows are what tells that the states stand: they come last.
        try:
            if error is None:
                rename(self._temporary, self._spool.directory / STATES)
        except OSError as refused:
            self._rows.__exit__(type(refused), refused, refused.__traceback__)
            raise
        finally:
            remove(self._temporary)
        self._rows.__exit__(kind, error, trace)


def open_states(spool: Spool, hidden_size: int, *, read_only: bool) -> KeptStates | None:
    """The states of a spool's rollouts, None where none stand."""
    file = spool.directory / STATES
    if not spool.has_column(ROWS) or not file.is_file():
        return None
    states = np.memmap(file, dtype=np.float32, mode="r").reshape(-1, hidden_size)
    return KeptStates(spool, states, read_only)


def give_states(critic: Critic, layers: int, sample: Rollouts, compute: Compute, *, forest: bool) -> bool:
    """Have the critic take kept states in place of tokens, where its last layers work on them.

    Args:
        critic: frozen below its last layers.
        layers: how many of them are trained; 0 for the head alone.
        sample: a few rollouts to try.
        compute: device, precision and token budget.
        forest: lay rollouts out as a forest, or as padded rows.

    Returns:
        Whether the critic will take them.
    """
    critic.give_states_to_last(layers)
    upper = critic.upper
    if upper is None:
        return True

    def agree() -> bool:
        batch = next(iter(micro_batches(sample, compute, forest=forest)))
        try:
            return upper_part_agrees(critic.trunk, upper, batch, TOLERANCE)
        except (TypeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            return False

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
    """Compute the states of a frozen trunk once, or find them from an earlier start.

    Args:
        critic: with its frozen part in place.
        rollouts: all rollouts of one spool whose states will be wanted.
        compute: device, precision and token budget.
        forest: lay rollouts out as a forest, or as padded rows.
        stop: looked at between micro-batches.

    Yields:
        Progress.

    Returns:
        The states; None when asked to stop.

    Raises:
        OSError: the disk is full.
    """
    spool, read_only = rollouts.spool, critic.upper is None
    hidden_size = int(critic.trunk.config.hidden_size)
    standing = open_states(spool, hidden_size, read_only=read_only)
    if standing is not None:
        return standing
    done = 0
    yield Progress(stage="keeping the frozen trunk's states", done=0, total=len(rollouts))
    try:
        with StatesWriter(spool, read_only=read_only) as writer:
            for places, batch in rollouts.by_group(ROLLOUTS_AT_ONCE):
                parts = _computed(critic, batch, compute, forest=forest, stop=stop)
                writer.add(rollouts.index[places], batch, parts)
                done += len(places)
                yield Progress(stage="keeping the frozen trunk's states", done=done, total=len(rollouts))
    except _StoppedError:
        return None
    return open_states(spool, hidden_size, read_only=read_only)


class _StoppedError(Exception):
    """Asked to stop; what was begun is removed."""


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
