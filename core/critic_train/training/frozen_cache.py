"""Hidden states of a frozen trunk, computed once and cached on disk: one for each position, however many share it.

Each rank writes the states of its share of the rollouts to a file of its own, and every rank maps all files. `ROWS` is
a column of the rollout cache that says, for every token, which row of which file holds its state; it is written last,
so that where it exists the states do. Files are mapped into memory: what was read lately stays there, and nothing has
to fit.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from critic_train.data.rollout_cache import ColumnWriter, RolloutCache, bytes_of
from critic_train.distributed.rank_errors import looks_lost
from critic_train.distributed.ranks import SINGLE_PROCESS, Ranks
from critic_train.errors import MachineError
from critic_train.events import Event, Notice, Progress
from critic_train.jsonio import read_json_object
from critic_train.layers.to_device import to_device
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic, last_layers_agree
from critic_train.model.fsdp import full_precision_params, reshard
from critic_train.model.microbatches import micro_batches
from critic_train.model.model_input import ModelInput
from critic_train.model.oom import attempts, is_out_of_memory
from critic_train.rollouts import Rollouts, offsets_from_lengths
from critic_train.run.storage import File, remove, rename, sync_directory, write_json
from critic_train.stopping import StopRequest
from critic_train.training.dataset import ROLLOUTS_PER_PASS, RolloutSet

ROWS = "state-rows"
FILES = "states.json"
"""How many rows each file has."""
NO_STATE = -1
ROW_BITS = 40
"""A token's entry in `ROWS` is its row in a file, and above these bits the file's number."""
STATE_BYTES, ROW_BYTES = 4, 8
"""Of one float32 of a state, and of a token's entry in `ROWS`."""


def states_file(cache: RolloutCache, rank: int) -> Path:
    """The file of the states that a rank computes."""
    return cache.directory / f"states-{rank:05d}"


@dataclass(frozen=True, slots=True)
class CachedStates:
    """The states of the rollouts of a cache.

    Attributes:
        cache: of the rollouts.
        files: float32 [K, hidden_size] each, mapped from disk; one for each rank that has written.
        read_only: whether only the states that the head reads are cached; else those of every position.
    """

    cache: RolloutCache
    files: list[NDArray[np.float32]]
    read_only: bool

    def add_to(self, batch: ModelInput, rollouts: Rollouts) -> ModelInput:
        """A micro-batch with its states.

        Args:
            batch: laid out.
            rollouts: the mini-batch it is a part of, out of the cache.
        """
        if self.read_only:
            rows = np.full(len(batch.read_positions), NO_STATE, dtype=np.int64)
            rows[batch.value_index_on_host] = self._rows(rollouts, batch.response_tokens)
        else:
            rows = np.full(batch.trunk_arguments["input_ids"].numel(), NO_STATE, dtype=np.int64)
            rows[batch.token_positions] = self._rows(rollouts, batch.all_tokens)
        states = to_device(self._take(rows), batch.read_positions.device)
        return replace(batch, cached_states=states)

    def _rows(self, rollouts: Rollouts, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [M], the entries in `ROWS` of some tokens of a mini-batch, int64 [M]."""
        if not len(tokens):
            return tokens
        owner = np.searchsorted(rollouts.offsets, tokens, side="right") - 1
        present, owner = np.unique(owner, return_inverse=True)
        index = self.cache.positions_of(rollouts.row[present])
        rows = self.cache.read_column(ROWS, np.int64, index)
        starts = offsets_from_lengths(self.cache.lengths[index])[:-1]
        return rows[starts[owner] + tokens - rollouts.offsets[present][owner]]  # type: ignore[no-any-return]

    def _take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32 [len(rows), hidden_size]; 0 for padding, to which no position attends."""
        # NO_STATE is -1, and stays negative when shifted: it belongs to no file.
        files, rows_in_file = rows >> ROW_BITS, rows & ((1 << ROW_BITS) - 1)
        numbers = np.unique(files).tolist()
        if len(numbers) == 1 and numbers[0] >= 0:
            return np.asarray(self.files[numbers[0]][rows_in_file])
        states = np.zeros((len(rows), self.files[0].shape[1]), dtype=np.float32)
        for number in numbers:
            if number >= 0:
                states[files == number] = self.files[number][rows_in_file[files == number]]
        return states


def open_states(cache: RolloutCache, hidden_size: int, *, read_only: bool) -> CachedStates | None:
    """The states of a cache's rollouts, None where they are not all there."""
    if not cache.has_column(ROWS):
        return None
    try:
        counts = [int(count) for count in read_json_object(cache.directory / FILES)["rows"]]
        files = [_map_file(states_file(cache, rank), count, hidden_size) for rank, count in enumerate(counts)]
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return CachedStates(cache, files, read_only)


def _map_file(file: Path, count: int, hidden_size: int) -> NDArray[np.float32]:
    """float32 [count, hidden_size]. Raises OSError or ValueError where the file is missing or has another size."""
    if file.stat().st_size != count * hidden_size * STATE_BYTES:
        raise ValueError(f"{file} has another size")
    if count == 0:  # an empty file cannot be mapped
        return np.zeros((0, hidden_size), dtype=np.float32)
    return np.memmap(file, dtype=np.float32, mode="r", shape=(count, hidden_size))


def clear_states(cache: RolloutCache) -> None:
    """Remove the states that an earlier start has left, of any number of ranks."""
    cache.drop_column(ROWS)
    for pattern in ("states*", ".states*"):
        for file in cache.directory.glob(pattern):
            remove(file)


Computed = tuple[ModelInput, NDArray[np.float32]]
"""A micro-batch and its states, on the CPU."""


class Share(NamedTuple):
    """The states of some rollouts, as written by all ranks.

    Attributes:
        rows: int64 [T], entries in `ROWS`, of all ranks together.
        end: rows in this rank's file after them.
    """

    rows: NDArray[np.int64]
    end: int


class StatesWriter:
    """Writes states while they are computed; they are in place when the `with` block ends without error on all ranks.

    Args:
        cache: of the rollouts.
        hidden_size: of a state.
        read_only: see CachedStates.
        ranks: each writes a file of its own; rank 0 writes `ROWS`.
    """

    def __init__(
        self, cache: RolloutCache, hidden_size: int, *, read_only: bool, ranks: Ranks = SINGLE_PROCESS
    ) -> None:
        self._cache = cache
        self._stride = STATE_BYTES * hidden_size
        self._read_only = read_only
        self._ranks = ranks
        self._count = 0
        self._target = states_file(cache, ranks.rank)
        self._temporary = self._target.with_name(f".{self._target.name}.tmp")
        self._rows: ColumnWriter | None = cache.new_column(ROWS, np.int64) if ranks.is_main else None
        self._file: File | None = None

    def __enter__(self) -> "StatesWriter":
        self._file = File(self._temporary, "create")
        if self._rows is not None:
            self._rows.__enter__()
        return self

    def write(self, rollouts: Rollouts, parts: Iterator[Computed]) -> Generator[int, None, Share]:
        """Write this rank's states of some rollouts; until `commit` they may be written again. All ranks call it.

        Args:
            rollouts: the rollouts, the same on all ranks.
            parts: every micro-batch of this rank's share of them, with its states on the CPU.

        Yields:
            The response tokens of each micro-batch, once its states are written.
        """
        assert self._file is not None
        # A token's entry + 1, and 0 where another rank has it: each token is computed by one rank, so the sum over
        # ranks is the entries of all.
        rows = np.zeros(len(rollouts.input_ids), dtype=np.int64)
        first, count = (self._ranks.rank << ROW_BITS) + 1, self._count
        for batch, states in parts:
            if self._read_only:
                rows[batch.response_tokens] = first + count + batch.value_index_on_host
            else:
                rows[batch.all_tokens] = first + count + batch.token_positions
            self._file.write_at(bytes_of(np.ascontiguousarray(states).reshape(-1)), count * self._stride)
            count += len(states)
            yield len(batch.response_tokens)
        return Share(self._ranks.all_reduce_sum(torch.from_numpy(rows)).numpy() - 1, count)

    def commit(self, index: NDArray[np.int64], share: Share) -> None:
        """Have the next states follow those that were written.

        Args:
            index: int64 [n], the rollouts' indices in the cache.
            share: what `write` returned.
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
                self._move_into_place()
        except BaseException as fault:
            if self._rows is not None:
                self._rows.__exit__(type(fault), fault, fault.__traceback__)
            raise
        finally:
            remove(self._temporary)
        if self._rows is not None:  # last: where this column exists, the states do
            self._rows.__exit__(kind, error, trace)

    def _move_into_place(self) -> None:
        rename(self._temporary, self._target)
        sync_directory(self._target.parent)
        counts = torch.zeros(self._ranks.size, dtype=torch.int64)
        counts[self._ranks.rank] = self._count
        counts = self._ranks.all_reduce_sum(counts)  # after this all ranks' files are in place
        if self._ranks.is_main:
            write_json(self._cache.directory / FILES, {"rows": counts.tolist()})


CACHING = "caching the frozen trunk's states"
"""The stage, as its progress names it."""
TOLERANCE = 1e-4
"""Largest difference of a hidden state, relative to the largest, that counts as rounding."""


def supports_cached_states(critic: Critic, layers: int, sample: Rollouts, compute: Compute, *, forest: bool) -> bool:
    """Have the critic take cached states in place of tokens, if its last layers give the same from them.

    Args:
        critic: frozen below its last layers.
        layers: how many of them are trained; 0 for the head alone.
        sample: a few rollouts to try.
        compute: device, precision and token budget.
        forest: lay rollouts out as a forest, or as padded rows.

    Returns:
        Whether it takes them, the same on all ranks.
    """
    critic.use_cached_states(layers)
    last_layers = critic.last_layers
    if last_layers is None:
        return True

    for attempt in attempts(critic, sample, compute):
        with attempt:
            batch = next(iter(micro_batches(sample, compute, forest=forest)))
            try:
                with full_precision_params((critic.trunk, critic.head)):
                    agrees = last_layers_agree(critic.trunk, last_layers, batch, TOLERANCE)
            except (TypeError, ValueError, RuntimeError) as error:
                if is_out_of_memory(error) or looks_lost(error):
                    raise
                agrees = False
            return not int(compute.ranks.all_reduce_sum(torch.tensor([not agrees], dtype=torch.int64)))
    raise AssertionError("attempts end by an error")


def no_cached_states_notice(critic: Critic) -> Notice:
    """The warning where the critic takes no cached states."""
    return Notice(
        message=f"the last layers of {critic.trunk.config.model_type} give other results from cached states: the "
        "frozen part is computed again in every epoch",
        level="warning",
    )


def cache_states(
    critic: Critic, rollouts: RolloutSet, compute: Compute, *, forest: bool, stop: StopRequest
) -> Generator[Event, None, CachedStates]:
    """Compute the states of a frozen trunk once, or open those of an earlier start. All ranks call it.

    Args:
        critic: with its frozen part in place.
        rollouts: all rollouts of one cache whose states will be needed; its directory is one that all ranks see.
        compute: device, precision and token budget, which is lowered where memory runs out.
        forest: lay rollouts out as a forest, or as padded rows.
        stop: checked between micro-batches.

    Yields:
        Progress.

    Raises:
        OSError: the disk is full.
        MachineError: a rank does not see what the others wrote, or has no memory for a single rollout.
        Stopped: asked to stop; what was begun is removed.
    """
    cache, read_only, ranks = rollouts.cache, critic.last_layers is None, compute.ranks
    hidden_size = int(critic.trunk.config.hidden_size)
    exist = False
    if ranks.is_main:
        exist = open_states(cache, hidden_size, read_only=read_only) is not None
        if not exist:
            clear_states(cache)
    if not ranks.broadcast(exist):
        done, total = 0, len(rollouts)
        yield Progress(stage=CACHING, done=0, total=total)
        with StatesWriter(cache, hidden_size, read_only=read_only, ranks=ranks) as writer:
            for index, batch in rollouts.by_group(ROLLOUTS_PER_PASS):
                shares = _share(writer, critic, batch, compute, forest, stop)
                share = yield from _reported(shares, batch, compute, done, total)
                writer.commit(rollouts.index[index], share)
                done += len(index)
                yield Progress(stage=CACHING, done=done, total=total)
        ranks.broadcast(True)  # the others open the states only now that they are in place
    states = open_states(cache, hidden_size, read_only=read_only)
    if states is None:
        raise MachineError(
            f"rank {ranks.rank} does not see the states that were cached in {cache.directory}",
            hint="--out must be on a file system that all machines share",
        )
    return states


def _share(
    writer: StatesWriter, critic: Critic, batch: Rollouts, compute: Compute, forest: bool, stop: StopRequest
) -> Generator[int, None, Share]:
    """This rank's share of some rollouts, computed and written, in smaller micro-batches where memory runs out.

    Yields:
        As `StatesWriter.write` does; 0 where it begins again.
    """
    for attempt in attempts(critic, batch, compute):
        yield 0
        with attempt:
            try:
                return (yield from writer.write(batch, _computed(critic, batch, compute, forest=forest, stop=stop)))
            finally:
                reshard((critic.trunk, critic.head))
    raise AssertionError("attempts end by an error")


def _reported(
    shares: Generator[int, None, Share], batch: Rollouts, compute: Compute, before: int, total: int
) -> Generator[Event, None, Share]:
    """Progress of `_share`, by the response tokens that are done; rollouts of `total` that were done `before`."""
    of_this_rank = max(1, int(batch.response_mask.sum())) / compute.ranks.size
    done = 0
    while True:
        try:
            tokens = next(shares)
        except StopIteration as ended:
            return ended.value  # type: ignore[no-any-return]
        done = done + tokens if tokens else 0
        if done < of_this_rank:
            yield Progress(stage=CACHING, done=before + int(done / of_this_rank * len(batch)), total=total)


@torch.no_grad()
def _computed(
    critic: Critic, rollouts: Rollouts, compute: Compute, *, forest: bool, stop: StopRequest
) -> Iterator[Computed]:
    for batch in micro_batches(rollouts, compute, forest=forest):
        stop.check_on_all_ranks()
        with compute.autocast():
            states = critic.states_to_cache(batch)
        yield batch, states.float().cpu().numpy()
