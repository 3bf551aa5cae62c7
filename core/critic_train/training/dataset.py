"""The rollouts of a run: read and checked once, then at hand in any order without growing memory."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from critic_train.data.addresses import UidLookup
from critic_train.data.bad_input import BadFiles
from critic_train.data.order import connected_groups, split_groups
from critic_train.data.reading import RolloutReader
from critic_train.data.rollout_cache import CacheDamaged, CacheWriter, RolloutCache
from critic_train.data.row_checks import FROM_SCRATCH, RowLimits
from critic_train.data.shards import Shard, find_shards, fingerprint
from critic_train.errors import DataError, MachineError
from critic_train.events import Event, Notice, Progress
from critic_train.jsonio import read_json_object
from critic_train.model.loading import ModelSource
from critic_train.rollouts import Rollouts
from critic_train.run.storage import make_directory, remove_tree, write_json
from critic_train.settings import FitSettings, column_renames
from critic_train.stopping import StopRequest
from critic_train.training.targets import Targets

ROLLOUTS_AT_ONCE = 512
"""Rollouts read together for a pass without gradients; prompt groups stand together in it."""

READING, READING_KEYS = "reading.json", {"rows_left_out", "files_left_out", "files_read"}
"""What is kept beside a spool: what of the shards is in it, and what is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSet:
    """Some rollouts of a spool: the ones to train on, or the ones held out.

    Attributes:
        spool: where they are kept.
        index: int64 [n], their places in the spool.
        files: name and rows of each shard they were read from, in order.
    """

    spool: RolloutCache
    index: NDArray[np.int64]
    files: list[tuple[str, int]]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def groups(self) -> NDArray[np.int64]:
        """int64 [n], the prompt group of each."""
        return self.spool.groups[self.index]

    @property
    def prompts(self) -> NDArray[np.int64]:
        """int64 [n], a key of the prompt of each."""
        return self.spool.prompts[self.index]

    @property
    def response_tokens(self) -> int:
        """Masked tokens of all of them."""
        return int(self.spool.response_counts[self.index].sum())

    @property
    def tokens(self) -> int:
        """Tokens of all of them."""
        return int(self.spool.lengths[self.index].sum())

    @property
    def mean_return(self) -> float:
        """The mean return over masked tokens."""
        return float(self.spool.return_sums[self.index].sum()) / self.response_tokens

    def read(self, places: NDArray[np.int64], values_from: str | None = None) -> Rollouts:
        """The rollouts at some places of this set."""
        return self.spool.read(self.index[places], values_from=values_from)

    def by_group(self, rollouts_at_once: int) -> Iterator[tuple[NDArray[np.int64], Rollouts]]:
        """All of them, prompt groups together, in batches: (places, rollouts)."""
        order = np.argsort(self.groups, kind="stable")
        for start in range(0, len(order), rollouts_at_once):
            places = order[start : start + rollouts_at_once]
            yield places, self.read(places)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """What a run trains on and is judged on.

    Attributes:
        train: the rollouts to learn from.
        held_out: the rollouts to judge on; None where there are none.
        left_out: the rows that were skipped on reading, by set, for the record.
        files_left_out: the same of whole files.
        uids: finds the uids of held-out rollouts.
    """

    train: RolloutSet
    held_out: RolloutSet | None
    left_out: dict[str, Any]
    files_left_out: dict[str, Any]
    uids: UidLookup

    @property
    def names(self) -> list[str]:
        """The sets that stand in the cache: "train", and "val" where there is --val-data."""
        sets = (self.train, self.held_out) if self.held_out is not None else (self.train,)
        return sorted({rollouts.spool.directory.name for rollouts in sets})

    def by_spool(self) -> list[RolloutSet]:
        """All rollouts of the run, those of one spool as one set."""
        if self.held_out is None:
            return [self.train]
        if self.held_out.spool is not self.train.spool:
            return [self.train, self.held_out]
        return [replace(self.train, index=np.concatenate([self.train.index, self.held_out.index]))]

    @property
    def max_token_id(self) -> int:
        """The largest token id of all rollouts."""
        sets = (self.train, self.held_out) if self.held_out is not None else (self.train,)
        return max(s.spool.max_token_id for s in sets)

    @property
    def max_length(self) -> int:
        """Tokens of the longest rollout."""
        sets = (self.train, self.held_out) if self.held_out is not None else (self.train,)
        return max(s.spool.max_length for s in sets)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunShards:
    """The shards of a run, found but not yet read, with their fingerprints for run.json.

    `bad_files` and `val_bad_files` are those whose footers cannot be read.
    """

    data: list[Shard]
    val_data: list[Shard]
    bad_files: BadFiles
    val_bad_files: BadFiles
    data_fingerprint: dict[str, Any]
    val_fingerprint: dict[str, Any] | None


def find_run_shards(settings: FitSettings) -> RunShards:
    """Find every shard that the settings name.

    Raises:
        DataError: a source is missing; all of them are named.
    """
    bad, val_bad = BadFiles(), BadFiles()
    data = find_shards(settings.reading.data, bad)
    val_data = find_shards(settings.reading.val_data, val_bad) if settings.reading.val_data else []
    return RunShards(
        data=data,
        val_data=val_data,
        bad_files=bad,
        val_bad_files=val_bad,
        data_fingerprint=fingerprint(data),
        val_fingerprint=fingerprint(val_data) if val_data else None,
    )


def limits_of(settings: FitSettings, source: ModelSource | None) -> RowLimits:
    """What the model can take, or what one made for the data may be asked to."""
    if source is not None:
        return RowLimits(vocab_size=source.vocab_size, max_length=source.max_length).at_most(
            settings.reading.max_length
        )
    if settings.reading.max_length is None:
        return FROM_SCRATCH
    return replace(FROM_SCRATCH, max_length=None).at_most(settings.reading.max_length)


def open_data(
    settings: FitSettings, shards: RunShards, limits: RowLimits, cache: Path, stop: StopRequest
) -> Generator[Event, None, RunData | None]:
    """Read all rollouts into the run's cache, or find them there, and split them.

    Args:
        settings: of the run.
        shards: from `find_run_shards`.
        limits: what the model can take.
        cache: the run's cache directory.
        stop: looked at between batches.

    Yields:
        Progress and notices.

    Returns:
        The rollouts; None when asked to stop.

    Raises:
        DataError: rows cannot be used, or nothing is left to train on.
    """
    left_out: dict[str, Any] = {}
    files_left_out: dict[str, Any] = {}
    files_read: dict[str, list[tuple[str, int]]] = {}
    spools: dict[str, RolloutCache] = {}
    sources = (
        ("train", shards.data, shards.bad_files, shards.data_fingerprint),
        ("val", shards.val_data, shards.val_bad_files, shards.val_fingerprint),
    )
    for name, files, bad_files, digest in sources:
        if not files:
            continue
        spool = yield from _spool(name, files, bad_files, digest or {}, settings, limits, cache, stop)
        if spool is None:
            return None
        spools[name] = spool
        kept = read_json_object(cache / name / READING)
        left_out[name], files_left_out[name] = kept["rows_left_out"], kept["files_left_out"]
        files_read[name] = [(file, rows) for file, rows in kept["files_read"]]
    train, held_out = _sets(settings, spools, files_read)
    if held_out is not None and "val" in spools:
        yield from _leak_notice(train, held_out)
    if not len(train):
        raise DataError("no rollouts are left to train on", hint="a lower --val-fraction holds out fewer prompts")
    judged = "val" if "val" in spools else "train"
    lost = {file["file"] for file in files_left_out[judged]["files"]}
    uids = UidLookup(shards.val_data or shards.data, column_renames(settings.reading.column), lost)
    return RunData(train=train, held_out=held_out, left_out=left_out, files_left_out=files_left_out, uids=uids)


def data_read_by_rank_0(settings: FitSettings, cache: Path, names: list[str]) -> RunData:
    """The rollouts that rank 0 has read into the run's cache, as another rank opens them.

    Args:
        settings: of the run.
        cache: the run's cache directory, on a file system that all ranks see.
        names: the sets of `RunData.names` on rank 0.

    Raises:
        MachineError: the cache is not to be seen from here.
    """
    try:
        spools = {name: RolloutCache.open(cache / name) for name in names}
    except CacheDamaged as fault:
        raise MachineError(
            f"the rollouts that rank 0 has read are not to be seen from here: {fault}",
            hint="--out must be on a file system that all machines share",
        ) from fault
    train, held_out = _sets(settings, spools, {name: [] for name in names})
    return RunData(train=train, held_out=held_out, left_out={}, files_left_out={}, uids=UidLookup([], {}, set()))


def _sets(
    settings: FitSettings, spools: dict[str, RolloutCache], files_read: dict[str, list[tuple[str, int]]]
) -> tuple[RolloutSet, RolloutSet | None]:
    """What to train on and what is held out: --val-data, or a share of the prompt groups."""
    everything = {
        name: RolloutSet(spool=spool, index=np.arange(spool.num_rollouts, dtype=np.int64), files=files_read[name])
        for name, spool in spools.items()
    }
    train, held_out = everything["train"], everything.get("val")
    if held_out is None:
        together = connected_groups(train.groups, train.prompts)
        kept, held = split_groups(together, settings.reading.val_fraction, settings.optimizer.seed)
        held_out = replace(train, index=held) if len(held) else None
        train = replace(train, index=kept)
    targets = Targets.of(settings)
    if held_out is not None and targets.moving and targets.recipe.bootstraps:
        # What would have followed a cut rollout nobody knows, and what this critic makes of it is no yardstick.
        whole = held_out.index[~held_out.spool.truncated[held_out.index]]
        held_out = replace(held_out, index=whole) if len(whole) else None
    return train, held_out


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


def _spool(
    name: str,
    files: list[Shard],
    bad_files: BadFiles,
    digest: dict[str, Any],
    settings: FitSettings,
    limits: RowLimits,
    cache: Path,
    stop: StopRequest,
) -> Generator[Event, None, RolloutCache | None]:
    """Yields progress and notices; returns the spool, None when asked to stop."""
    directory = cache / name
    targets = Targets.of(settings)
    read_as = {
        "shards": digest,
        "columns": settings.reading.column,
        "limits": [limits.vocab_size, limits.max_length],
        "targets": targets.as_record(),
        "on_bad_rows": settings.reading.on_bad_rows,
        "on_bad_file": settings.reading.on_bad_file,
        "bad_files": list(bad_files.by_name),
    }
    known = directory / "read_as.json"
    if known.is_file():
        try:
            if read_json_object(known) == read_as and read_json_object(directory / READING).keys() == READING_KEYS:
                return RolloutCache.open(directory)
        except (OSError, ValueError) as fault:
            yield Notice(message=f"the run's cache is read anew: {fault}", level="warning")
    remove_tree(directory)
    make_directory(cache, exist_ok=True)
    reader = RolloutReader(
        files,
        renames=column_renames(settings.reading.column),
        on_bad_rows=settings.reading.on_bad_rows,
        on_bad_file=settings.reading.on_bad_file,
        bad_files=bad_files,
        limits=limits,
        needs=targets.needs,
        drop_truncated=settings.returns.truncated == "drop",
        stop=stop,
    )
    total = sum(shard.num_rows for shard in files)
    stage = "reading rollouts" if name == "train" else "reading held-out rollouts"
    yield Progress(stage=stage, done=0, total=total)
    with CacheWriter(directory) as writer:
        for batch in reader:
            if stop.requested:
                writer.abandon()
                return None
            writer.add(targets.on_reading(batch))
            yield Progress(stage=stage, done=int(batch.row[-1]) + 1, total=total)
        if stop.requested:
            writer.abandon()
            return None
    spool = RolloutCache.open(directory)
    yield Progress(stage=stage, done=total, total=total)
    for sentence in reader.notices:
        yield Notice(message=sentence)
    if reader.truncated_left_out:
        yield Notice(message=f"{reader.truncated_left_out} cut rollouts are left out (--truncated drop)")
    if bad_files:
        yield Notice(message=bad_files.sentence(), level="warning")
    record = {
        "rows_left_out": reader.bad_rows.summary(),
        "files_left_out": bad_files.summary(),
        "files_read": reader.files_read,
    }
    write_json(directory / READING, record)
    write_json(known, read_as)
    return spool
