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
from critic_train.model.loading import ModelSource
from critic_train.run.run_directory import RunDirectory
from critic_train.run.storage import make_directory, remove_tree, require_room, write_json
from critic_train.settings import TrainReadingSettings, column_renames
from critic_train.stopping import StopRequest
from critic_train.training.dataset import READING, RunData
from critic_train.training.targets import Targets

CACHED_BYTES_PER_TOKEN = 13
"""Of the run's cache: token id 4, mask 1, return 4, value 4."""
READING_KEYS = {"rows_left_out", "files_left_out", "files_read"}
READ_AS = "read_as.json"
"""Beside the columns of a cache: the shards and settings that it was made from. Written last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunShards:
    """The shards of a run, listed but not yet read, with their fingerprints for run.json.

    `bad_files` and `val_bad_files` are those whose footers cannot be read.
    """

    data: list[Shard]
    val_data: list[Shard]
    bad_files: BadFiles
    val_bad_files: BadFiles
    data_fingerprint: dict[str, Any]
    val_fingerprint: dict[str, Any] | None


NO_SHARDS = RunShards(
    data=[],
    val_data=[],
    bad_files=BadFiles(),
    val_bad_files=BadFiles(),
    data_fingerprint={},
    val_fingerprint=None,
)
"""Of ranks other than 0, which read no shards."""


def find_run_shards(settings: TrainReadingSettings) -> RunShards:
    """Find every shard that the settings name.

    Raises:
        DataError: a source is missing; all of them are named.
    """
    bad, val_bad = BadFiles(), BadFiles()
    data = find_shards(settings.data, bad)
    val_data = find_shards(settings.val_data, val_bad) if settings.val_data else []
    return RunShards(
        data=data,
        val_data=val_data,
        bad_files=bad,
        val_bad_files=val_bad,
        data_fingerprint=fingerprint(data),
        val_fingerprint=fingerprint(val_data) if val_data else None,
    )


def row_limits(max_length: int | None, source: ModelSource | None) -> RowLimits:
    """Which rows can be used: what the model can take, or what a new one may be asked to.

    Args:
        max_length: --max-length.
        source: the model to start from; None for a new one.
    """
    if source is not None:
        return RowLimits(vocab_size=source.vocab_size, max_length=source.max_length).at_most(max_length)
    if max_length is None:
        return FROM_SCRATCH
    return replace(FROM_SCRATCH, max_length=None).at_most(max_length)


def uid_lookup(shards: RunShards, data: RunData, settings: TrainReadingSettings) -> UidLookup:
    """Finds the uids of held-out rollouts in the shards; on ranks other than 0 there are none to find."""
    left_out = data.files_left_out["val" if shards.val_data else "train"]["files"]
    names = {file["file"] for file in left_out}
    return UidLookup(shards.val_data or shards.data, column_renames(settings.column), names)


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
    require_room_for_cache(run, shards.data + shards.val_data)
    names: list[str] = []
    sources = (
        ("train", shards.data, shards.bad_files, shards.data_fingerprint),
        ("val", shards.val_data, shards.val_bad_files, shards.val_fingerprint or {}),
    )
    for name, files, bad_files, digest in sources:
        if not files:
            continue
        names.append(name)
        read_as = {
            "shards": digest,
            "columns": settings.column,
            "limits": [limits.vocab_size, limits.max_length],
            "targets": targets.as_record(),
            "on_bad_rows": settings.on_bad_rows,
            "on_bad_file": settings.on_bad_file,
            "bad_files": list(bad_files.by_name),
        }
        directory = run.cache / name
        try:
            if _was_read_as(directory, read_as):
                continue
        except (OSError, ValueError) as error:
            yield Notice(message=f"the run's cache is read anew: {error}", level="warning")
        remove_tree(directory)
        make_directory(run.cache, exist_ok=True)
        reader = RolloutReader(
            files,
            renames=column_renames(settings.column),
            on_bad_rows=settings.on_bad_rows,
            on_bad_file=settings.on_bad_file,
            bad_files=bad_files,
            limits=limits,
            needs=targets.needs,
            drop_truncated=targets.drops_truncated,
            stop=stop,
        )
        stage = "reading rollouts" if name == "train" else "reading held-out rollouts"
        yield from _fill_cache(reader, targets, directory, stage, sum(shard.num_rows for shard in files), stop)
        yield from _reading_notices(reader, bad_files)
        record = {
            "rows_left_out": reader.bad_rows.summary(),
            "files_left_out": bad_files.summary(),
            "files_read": reader.files_read,
        }
        write_json(directory / READING, record)
        write_json(directory / READ_AS, read_as)
    return names


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
    reader: RolloutReader, targets: Targets, directory: Path, stage: str, total: int, stop: StopRequest
) -> Iterator[Event]:
    """Write what a reader gives into a new cache; yields progress. Raises Stopped, and leaves nothing behind then."""
    yield Progress(stage=stage, done=0, total=total)
    with CacheWriter(directory) as writer:
        for batch in reader:
            stop.check()
            writer.add(targets.on_reading(batch))
            yield Progress(stage=stage, done=int(batch.row[-1]) + 1, total=total)
        stop.check()  # the reader ends early when asked to stop
    yield Progress(stage=stage, done=total, total=total)


def _reading_notices(reader: RolloutReader, bad_files: BadFiles) -> Iterator[Event]:
    for sentence in reader.notices:
        yield Notice(message=sentence)
    if reader.truncated_left_out:
        yield Notice(message=f"{reader.truncated_left_out} cut rollouts are left out (--truncated drop)")
    if bad_files:
        yield Notice(message=bad_files.sentence(), level="warning")
