"""The rollouts of a run, as all ranks open them from the run's cache, and their split."""

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from critic_train.data.addresses import Address, addresses
from critic_train.data.order import connected_groups, split_groups
from critic_train.data.rollout_cache import RolloutCache
from critic_train.errors import DataError, MachineError
from critic_train.events import Event, Notice
from critic_train.jsonio import read_json_object
from critic_train.rollouts import Rollouts
from critic_train.settings import TrainReadingSettings, column_renames
from critic_train.training.targets import Targets

ROLLOUTS_PER_PASS = 512
"""Rollouts read together for a pass without gradients; prompt groups stand together in it."""

MOST_TOKENS_OF_A_GROUP = 2**20
"""Tokens of a prompt's rollouts that are read to fit the token budget to them."""

READING = "reading.json"
"""Beside the columns of a cache: which rows and files of the shards are in it, and which were left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSet:
    """Some rollouts of a cache: the ones to train on, or the ones held out.

    Attributes:
        cache: that holds them.
        index: int64 [n], their indices in the cache.
        files: name and rows of each shard they were read from, in order.
        renames: canonical name -> column of the shards, from --column.
    """

    cache: RolloutCache
    index: NDArray[np.int64]
    files: list[tuple[str, int]]
    renames: dict[str, str]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def groups(self) -> NDArray[np.int64]:
        """int64 [n], the prompt group of each."""
        return self.cache.groups[self.index]

    @property
    def prompts(self) -> NDArray[np.int64]:
        """int64 [n], a key of the prompt of each."""
        return self.cache.prompts[self.index]

    def largest_group(self) -> Rollouts:
        """The rollouts of the prompt with the most tokens; of very many, the first MOST_TOKENS_OF_A_GROUP."""
        keys, group = np.unique(self.groups, return_inverse=True)
        lengths = self.cache.lengths[self.index]
        largest = np.flatnonzero(self.groups == keys[np.bincount(group, lengths).argmax()])
        few = np.cumsum(lengths[largest]) <= MOST_TOKENS_OF_A_GROUP
        few[0] = True
        return self.read(largest[few])

    @property
    def response_tokens(self) -> int:
        """Masked tokens of all of them."""
        return int(self.cache.response_counts[self.index].sum())

    @property
    def mean_return(self) -> float:
        """The mean return over masked tokens."""
        return float(self.cache.return_sums[self.index].sum()) / self.response_tokens

    def return_deviation(self) -> float:
        """The standard deviation of the returns over masked tokens; 0 exactly where all are equal. Reads them all."""
        total, least, most, mean = 0.0, np.inf, -np.inf, self.mean_return
        for start in range(0, len(self), ROLLOUTS_PER_PASS):
            index = self.index[start : start + ROLLOUTS_PER_PASS]
            mask = self.cache.read_column("response_mask", np.bool_, index)
            returns = self.cache.read_column("returns", np.float32, index)[mask].astype(np.float64)
            total += float(np.square(returns - mean).sum())
            least, most = min(least, returns.min(initial=np.inf)), max(most, returns.max(initial=-np.inf))
        return 0.0 if least == most else math.sqrt(total / self.response_tokens)

    def read(self, index: NDArray[np.int64], values_from: str | None = None) -> Rollouts:
        """Read some rollouts.

        Args:
            index: int64 [m], indices in this set.
            values_from: an extra column of the cache to take as `values` in place of the stored ones.
        """
        return self.cache.read(self.index[index], values_from=values_from)

    def by_group(self, rollouts_at_once: int) -> Iterator[tuple[NDArray[np.int64], Rollouts]]:
        """All of them, prompt groups together, in batches: (int64 [m] indices in this set, rollouts)."""
        order = np.argsort(self.groups, kind="stable")
        for start in range(0, len(order), rollouts_at_once):
            index = order[start : start + rollouts_at_once]
            yield index, self.read(index)

    def addresses(self, rows: NDArray[np.int64]) -> list[Address]:
        """File, row group, row and uid of rollouts, given their rows in the data set, int64 [m]."""
        return addresses(rows, self.files, self.renames)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataShape:
    """What a new critic, or a new head, is made for.

    Attributes:
        max_token_id: the largest token id of the rollouts.
        max_length: tokens of the longest rollout.
        mean_return: over masked tokens; what a new head predicts.
    """

    max_token_id: int
    max_length: int
    mean_return: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """What a run trains on and is evaluated on.

    Attributes:
        train: the rollouts to learn from.
        held_out: the rollouts to evaluate on; None where there are none.
        left_out: the rows that were skipped on reading, by set ("train", "val"), for the record.
        files_left_out: the same of whole files.
    """

    train: RolloutSet
    held_out: RolloutSet | None
    left_out: dict[str, Any]
    files_left_out: dict[str, Any]

    def by_cache(self) -> list[RolloutSet]:
        """All rollouts of the run, those of one cache as one set."""
        if self.held_out is None:
            return [self.train]
        if self.held_out.cache is not self.train.cache:
            return [self.train, self.held_out]
        return [replace(self.train, index=np.concatenate([self.train.index, self.held_out.index]))]

    @property
    def shape(self) -> DataShape:
        """Of all rollouts; the mean return is that of the ones to train on."""
        caches = [rollouts.cache for rollouts in self.by_cache()]
        return DataShape(
            max_token_id=max(cache.max_token_id for cache in caches),
            max_length=max(cache.max_length for cache in caches),
            mean_return=self.train.mean_return,
        )


def open_data(
    settings: TrainReadingSettings, targets: Targets, cache: Path, names: list[str], seed: int
) -> Generator[Event, None, RunData]:
    """Open the rollouts that rank 0 has read into the run's cache, and split them. All ranks call it.

    Args:
        settings: --val-fraction, and --column.
        targets: what the returns are made of.
        cache: the run's cache directory, on a file system that all ranks see.
        names: the sets in it, from `read_rollouts`.
        seed: of the split.

    Yields:
        A warning where held-out prompts are also trained on.

    Raises:
        DataError: nothing is left to train on.
        MachineError: this rank does not see the cache.
    """
    sets: dict[str, RolloutSet] = {}
    left_out: dict[str, Any] = {}
    files_left_out: dict[str, Any] = {}
    try:
        for name in names:
            opened = RolloutCache.open(cache / name)
            record = read_json_object(cache / name / READING)
            left_out[name], files_left_out[name] = record["rows_left_out"], record["files_left_out"]
            sets[name] = RolloutSet(
                cache=opened,
                index=np.arange(opened.num_rollouts, dtype=np.int64),
                files=[(file, rows) for file, rows in record["files_read"]],
                renames=column_renames(settings.column),
            )
    except (OSError, ValueError) as error:
        raise MachineError(
            f"the rollouts that rank 0 has read cannot be seen from here: {error}",
            hint="--out must be on a file system that all machines share",
        ) from error
    train, held_out = sets["train"], sets.get("val")
    if held_out is None:
        train, held_out = _split(train, settings.val_fraction, seed)
    if held_out is not None and targets.moving and targets.recipe.bootstraps:
        # The return of a cut rollout would contain this critic's own prediction, which is nothing to judge it by.
        complete = held_out.index[~held_out.cache.truncated[held_out.index]]
        held_out = replace(held_out, index=complete) if len(complete) else None
    if held_out is not None and "val" in sets:
        yield from _leak_notice(train, held_out)
    if not len(train):
        raise DataError("no rollouts are left to train on", hint="a lower --val-fraction holds out fewer prompts")
    return RunData(train=train, held_out=held_out, left_out=left_out, files_left_out=files_left_out)


def _split(rollouts: RolloutSet, val_fraction: float, seed: int) -> tuple[RolloutSet, RolloutSet | None]:
    """(the rollouts to train on, those of the prompt groups held out; None where there are none)."""
    together = connected_groups(rollouts.groups, rollouts.prompts)
    train, held_out = split_groups(together, val_fraction, seed)
    return replace(rollouts, index=train), replace(rollouts, index=held_out) if len(held_out) else None


def _leak_notice(train: RolloutSet, held_out: RolloutSet) -> Iterator[Event]:
    """A warning where held-out prompts are also trained on."""
    leaked = np.isin(held_out.groups, train.groups) | np.isin(held_out.prompts, train.prompts)
    shared, groups = len(np.unique(held_out.groups[leaked])), len(np.unique(held_out.groups))
    if shared:
        yield Notice(
            message=f"{shared} of {groups} held-out prompt groups are also in --data, by uid or by prompt: held-out "
            "figures will flatter the critic; critic-train check --against counts them",
            level="warning",
        )


def data_notices(data: RunData, targets: Targets) -> Iterator[Notice]:
    """Notices about the rollouts that a run is evaluated on."""
    if data.held_out is None:
        yield Notice(message="no held-out rollouts: the critic is not evaluated", level="warning")
    elif targets.moving:
        yield Notice(
            message="held-out rollouts are evaluated against Monte-Carlo returns: "
            "GAE's depend on this critic's own values"
        )
