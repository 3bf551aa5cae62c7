"""A folder that shards are written to: who writes which part, with what it was begun, what is done.

Write a shard again, its rows changed on the way: same name, same row groups, one row group in memory.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from critic_train.data.decoding import damaged, pieces, refuse_oversized_rows
from critic_train.data.shards import Shard, absolute_path
from critic_train.data.stores import parquet_file
from critic_train.data.writing import ShardFile
from critic_train.errors import ConfigError, MachineError
from critic_train.jsonio import read_json_object_or_none
from critic_train.run.changes import refuse_changes
from critic_train.run.lock import Lock
from critic_train.run.storage import make_directory, remove_tree, rename, sync_directory, write_file
from critic_train.stopping import StopRequest


class OutputDirectory:
    """A part of an output folder held by this process, from `with` to its end.

    Args:
        path: the folder; created where it is missing.
        command: the command that writes it, as in "predict": PATH/_predict.json says how it was begun, and
            PATH/.predict holds locks and whatever is kept until the files stand. Names that begin so are passed over
            by whoever reads the folder as Parquet: Arrow, Spark and critic-train.
        places: key -> a file that will be written, of all parts.
        part: (K, N), of which this process is the K-th.

    Attributes:
        path: the folder.
        work: where to keep what is needed until the files stand.

    Raises:
        MachineError: it cannot be written, or another process writes the same part.
    """

    def __init__(self, path: Path, command: str, places: dict[str, Path], part: tuple[int, int] = (1, 1)) -> None:
        self.path = path
        self._places = places
        self._alone = part[1] == 1
        self._record = path / f"_{command}.json"
        self.work = path / f".{command}"
        self._name = f"part-{part[0]}-of-{part[1]}"
        self._lock = Lock(self.work / f"{self._name}.lock", "--to")

    def __enter__(self) -> "OutputDirectory":
        try:
            make_directory(self.work, exist_ok=True)
            self._lock.__enter__()
        except OSError as error:
            raise MachineError(f"{self.path} cannot be written: {error.strerror}", hint="give another --to") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.__exit__(kind, error, trace)
        if isinstance(error, OSError):
            told = f"{error.strerror or error}: {error.filename or self.path}"
            raise MachineError(told, hint="see to it and run the same command again") from error

    def compare(self, record: dict[str, Any]) -> list[str]:
        """Write what this is begun with, or hold it against what it was begun with.

        Returns:
            Notices about differences that are allowed.

        Raises:
            ConfigError: it was begun differently, or files stand there that are not of this job.
        """
        before = self._begun_with()
        if before is not None:
            return refuse_changes(before, record, self.path, "--to")
        strange = [place for place in self._places.values() if place.exists()]
        if strange:
            raise ConfigError(f"{strange[0]} stands there already", hint="give a folder of its own with --to")
        # Under a name of its own first: other parts may begin at the same moment, with the same record.
        temporary = self.work / f"{self._name}.json"
        write_file(temporary, json.dumps(record, indent=2, allow_nan=False).encode() + b"\n")
        rename(temporary, self._record)
        sync_directory(self.path)
        return []

    def _begun_with(self) -> dict[str, Any] | None:
        return read_json_object_or_none(self._record)

    def is_written(self, key: str) -> bool:
        """Whether a file stands: files stand whole or not at all."""
        return self._places[key].is_file()

    def clear(self) -> None:
        """Remove what this process no longer needs; with several parts, once the files of all of them stand."""
        if self._alone or all(place.is_file() for place in self._places.values()):
            remove_tree(self.work)


ROW_GROUP_BYTES = 2**29
"""Arrow bytes at which a row group is cut in two: it must fit in memory, whoever wrote the file."""

Change = Callable[[int, pa.RecordBatch], pa.RecordBatch]
"""From a piece's first row in the file and its rows to the rows to write."""


def copied(shard: Shard, target: Path, schema: pa.Schema, change: Change, stop: StopRequest) -> Iterator[int]:
    """Write a shard's rows, changed, under another path. The file stands when this ends.

    Row groups keep their bounds, save those of more than 512 MiB in memory, which are cut.

    Args:
        shard: the file to read; all its columns are.
        target: the file to write.
        schema: of the changed rows.
        change: makes them.
        stop: looked at between pieces.

    Yields:
        How many rows were read so far.

    Raises:
        Stopped: asked to stop; no file stands under the target's name.
        DataError: the shard is damaged.
        OSError: the disk is full or not writable.
    """
    pending: list[pa.RecordBatch] = []
    row = row_group = weight = 0
    with ShardFile(target, schema) as file:

        def write() -> None:
            if pending:
                file.write_row_group(pa.Table.from_batches(pending, schema=schema))
                pending.clear()

        for piece in pieces(shard, list(schema_of(shard).names)):
            stop.check()
            refuse_oversized_rows(shard, piece)
            if piece.row_group != row_group or weight > ROW_GROUP_BYTES:
                write()
                row_group, weight = piece.row_group, 0
            pending.append(change(row, piece.rows))
            weight += pending[-1].nbytes
            row += piece.rows.num_rows
            yield row
        write()


def schema_of(shard: Shard) -> pa.Schema:
    """The Arrow schema of a shard."""
    try:
        with parquet_file(shard.path) as file:
            return file.schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise damaged(shard, error) from error


def target_paths(shards: list[Shard], sources: list[str], directory: Path) -> dict[str, Path]:
    """Where each shard is written: under its name, relative to the folder that all of them share.

    Args:
        shards: from `find_shards`.
        sources: what they were found in (`--data`).
        directory: the folder to write to.

    Returns:
        Shard name -> path.

    Raises:
        ConfigError: a shard would be replaced, or the next command would find old and new ones together.
    """
    folder = os.path.commonpath([os.path.dirname(absolute_path(shard.path)) for shard in shards])
    target = directory.resolve()
    for source in sources:
        if os.path.isdir(source) and target.is_relative_to(Path(source).resolve()):
            raise ConfigError(
                f"--to {directory} lies in {source}, which is read: the same command would then read its own output",
                hint="give a folder beside it",
            )
    found = {shard.name: directory / os.path.relpath(absolute_path(shard.path), folder) for shard in shards}
    for shard in shards:
        if os.path.realpath(found[shard.name]) == os.path.realpath(shard.path):
            raise ConfigError(
                f"{shard.name} would be replaced by what is made of it", hint="give another folder with --to"
            )
    return found
