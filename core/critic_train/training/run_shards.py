"""The shards of a run, which rank 0 reads and checks once, into the run's cache."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from critic_train.data.addresses import UidLookup
from critic_train.data.bad_input import BadFiles
from critic_train.data.parquet_footer import FooterError, read_footer
from critic_train.data.reading import RolloutReader
from critic_train.data.rollout_cache import CacheWriter, RolloutCache
from critic_train.data.row_checks import FROM_SCRATCH, RowLimits
from critic_train.data.shards import Shard, find_shards, fingerprint
from critic_train.data.stores import open_file
from critic_train.events import Event, Notice, Progress
from critic_train.jsonio import read_json_object
from critic_train.run.run_directory import RunDirectory
from critic_train.run.storage import make_directory, remove_tree, require_room, write_json
from critic_train.settings import TrainReadingSettings, column_renames
from critic_train.stopping import StopRequest
from critic_train.training.dataset import READING, RunData
from critic_train.training.targets import Targets
from critic_train.weights.first_pass import limits_of
from critic_train.weights.loading import ModelSource

CACHED_BYTES_PER_TOKEN = 13
"""Of the run's cache: token id 4, mask 1, return 4, value 4."""
READING_KEYS = {"rows_left_out", "files_left_out", "files_read"}
READ_AS = "read_as.json"
"""Beside the columns of a cache: the shards and settings that it was made from. Written last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSet:
    """The shards of --data or of --val-data, listed but not yet read.

    Attributes:
        name: of the set in the run's cache: "train" or "val".
        shards: in the order in which they are read.
        bad_files: those whose footers cannot be read.
        fingerprint: of the shards, for run.json.
    """

    name: str
    shards: list[Shard]
    bad_files: BadFiles
    fingerprint: dict[str, Any]

    @property
    def num_rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.num_rows for shard in self.shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunShards:
    """The shards of a run; `val` is None without --val-data."""

    train: ShardSet
    val: ShardSet | None

    @property
    def sets(self) -> list[ShardSet]:
        """Both, or the one that there is."""
        return [self.train] if self.val is None else [self.train, self.val]


NO_SHARDS = RunShards(train=ShardSet(name="train", shards=[], bad_files=BadFiles(), fingerprint={}), val=None)
"""Of ranks other than 0, which read no shards."""


def find_run_shards(settings: TrainReadingSettings) -> RunShards:
    """Find every shard that the settings name.

    Raises:
        DataError: a source is missing; all of them are named.
    """
    train = _find_set("train", settings.data)
    return RunShards(train=train, val=_find_set("val", settings.val_data) if settings.val_data else None)


def _find_set(name: str, sources: list[str]) -> ShardSet:
    bad_files = BadFiles()
    shards = find_shards(sources, bad_files)
    return ShardSet(name=name, shards=shards, bad_files=bad_files, fingerprint=fingerprint(shards))


def row_limits(max_length: int | None, source: ModelSource | None) -> RowLimits:
    """Which rows can be used: what the model can take, or what a new one may be asked to.

    Args:
        max_length: --max-length.
        source: the model to start from; None for a new one.
    """
    if source is not None:
        return limits_of([source]).at_most(max_length)
    if max_length is None:
        return FROM_SCRATCH
    return replace(FROM_SCRATCH, max_length=None).at_most(max_length)


def uid_lookup(shards: RunShards, data: RunData, settings: TrainReadingSettings) -> UidLookup:
    """Finds the uids of held-out rollouts in the shards; on ranks other than 0 there are none to find."""
    held_out = shards.val or shards.train
    left_out = data.files_left_out["val" if "val" in data.files_left_out else "train"]["files"]
    return UidLookup(held_out.shards, column_renames(settings.column), {file["file"] for file in left_out})


def read_rollouts(
    settings: TrainReadingSettings,
    targets: Targets,
    shards: RunShards,
    limits: RowLimits,
    run: RunDirectory,
    stop: StopRequest,
) -> Generator[Event, None, list[str]]:
    """Read all rollouts into the run's cache, unless they are there from an earlier start. Rank 0 calls it alone.

    Args:
        settings: which columns, and what to do about bad rows and files.
        targets: what the returns are made of.
        shards: from `find_run_shards`.
        limits: which rows can be used.
        run: the rollouts go into its cache.
        stop: checked between batches.

    Yields:
        Progress and notices.

    Returns:
        The names of the sets in the cache: "train", and "val" where there is --val-data.

    Raises:
        DataError: rows cannot be used.
        MachineError: they will not fit on the disk.
        Stopped: asked to stop.
    """
    require_room_for_cache(run, [shard for shard_set in shards.sets for shard in shard_set.shards])
    for shard_set in shards.sets:
        read_as = _read_as(settings, targets, limits, shard_set)
        directory = run.cache / shard_set.name
        try:
            if _was_read_as(directory, read_as):
                continue
        except (OSError, ValueError) as error:
            yield Notice(message=f"the run's cache is read anew: {error}", level="warning")
        remove_tree(directory)
        make_directory(run.cache, exist_ok=True)
        reader = RolloutReader(
            shard_set.shards,
            renames=column_renames(settings.column),
            on_bad_rows=settings.on_bad_rows,
            on_bad_file=settings.on_bad_file,
            bad_files=shard_set.bad_files,
            limits=limits,
            needs=targets.needs,
            drop_truncated=targets.drops_truncated,
            group_by=settings.group_by,
            stop=stop,
        )
        yield from _fill_cache(reader, targets, directory, shard_set, stop)
        write_json(directory / READ_AS, read_as)
    return [shard_set.name for shard_set in shards.sets]


def require_room_for_cache(run: RunDirectory, shards: list[Shard]) -> None:
    """Check that the rollouts, once read, will fit on the disk; what is cached already counts as room.

    The size is a lower bound, from the shards' footers: no disk is refused that would have done.

    Raises:
        MachineError: they will not.
    """
    cached = sum(file.stat().st_size for file in run.cache.rglob("*") if file.is_file())
    tokens = sum(_min_tokens(shard) for shard in shards)
    require_room(
        run.path,
        CACHED_BYTES_PER_TOKEN * tokens - cached,
        f"the cache of {tokens:,} tokens",
        hint="make room, or give another --out",
    )


def _min_tokens(shard: Shard) -> int:
    """A lower bound of the tokens in a shard: the longest column of integers, by the footer."""
    try:
        with open_file(shard.path) as file:
            groups = read_footer(file).row_groups()
    except (FooterError, OSError):
        return 0  # the reader reports it
    return sum(max((chunk.elements for chunk in group.chunks if chunk.is_integer), default=0) for group in groups)


def _read_as(
    settings: TrainReadingSettings, targets: Targets, limits: RowLimits, shard_set: ShardSet
) -> dict[str, Any]:
    """All that the content of a cache depends on, JSON-able."""
    return {
        "shards": shard_set.fingerprint,
        "columns": settings.column,
        "limits": [limits.vocab_size, limits.max_length],
        "targets": targets.as_record(),
        "on_bad_rows": settings.on_bad_rows,
        "on_bad_file": settings.on_bad_file,
        "bad_files": list(shard_set.bad_files.by_name),
        **({} if settings.group_by is None else {"group_by": settings.group_by}),
    }


def _was_read_as(directory: Path, read_as: dict[str, Any]) -> bool:
    """Whether a cache stands complete and holds what would be read now.

    Raises:
        OSError, ValueError: it is damaged.
    """
    if not (directory / READ_AS).is_file():
        return False
    if read_json_object(directory / READ_AS) != read_as or read_json_object(directory / READING).keys() != READING_KEYS:
        return False
    RolloutCache.open(directory)
    return True


def _fill_cache(
    reader: RolloutReader, targets: Targets, directory: Path, shard_set: ShardSet, stop: StopRequest
) -> Iterator[Event]:
    """Write what a reader gives into a new cache, and the record of what was left out.

    Yields:
        Progress and notices.

    Raises:
        Stopped: asked to stop; nothing is left behind.
    """
    total = shard_set.num_rows
    stage = "reading rollouts" if shard_set.name == "train" else "reading held-out rollouts"
    yield Progress(stage=stage, done=0, total=total)
    with CacheWriter(directory) as writer:
        for batch in reader:
            stop.check()
            writer.add(targets.on_reading(batch))
            yield Progress(stage=stage, done=int(batch.row[-1]) + 1, total=total)
        stop.check()  # the reader ends early when asked to stop
    yield Progress(stage=stage, done=total, total=total)
    for sentence in reader.notices:
        yield Notice(message=sentence)
    if reader.truncated_left_out:
        yield Notice(message=f"{reader.truncated_left_out} cut rollouts are left out (--truncated drop)")
    if shard_set.bad_files:
        yield Notice(message=shard_set.bad_files.sentence(), level="warning")
    record = {
        "rows_left_out": reader.bad_rows.summary(),
        "files_left_out": shard_set.bad_files.summary(),
        "files_read": reader.files_read,
    }
    write_json(directory / READING, record)
