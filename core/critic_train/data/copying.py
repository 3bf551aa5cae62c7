"""Shards copied to an output folder with their rows changed: `predict` and `split` write theirs so.

The folder records the settings it was begun with and is locked while it is written, each part of it by one process.
Copies have the names and the row groups of their originals; one row group is in memory.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from critic_train.data.decoding import damaged, pieces, refuse_oversized_rows
from critic_train.data.schema import Needs, resolve_schema
from critic_train.data.shards import Shard, absolute_path
from critic_train.data.stores import parquet_file
from critic_train.data.writing import ShardFile
from critic_train.errors import ConfigError, MachineError
from critic_train.jsonio import read_json_object_or_none
from critic_train.run.changes import refuse_changes
from critic_train.run.lock import Lock
from critic_train.run.storage import first_data_file, make_directory, remove_tree, rename_durably, write_file
from critic_train.stopping import StopRequest


class OutputDirectory:
    """A part of an output folder, locked by this process inside the `with` block.

    Args:
        path: the folder; created where it is missing.
        command: the command that writes it, as in "predict": PATH/_predict.json records how it was begun, and
            PATH/.predict holds locks and temporary files. Arrow, Spark and critic-train ignore such names when they
            read the folder as Parquet.
        targets: key -> a file that will be written, of all parts.
        part: (K, N), of which this process is the K-th.

    Attributes:
        path: the folder.
        work: directory of files that are needed until the output is complete.

    Raises:
        ConfigError: it holds other data.
        MachineError: it cannot be written, or another process writes the same part.
    """

    def __init__(self, path: Path, command: str, targets: dict[str, Path], part: tuple[int, int] = (1, 1)) -> None:
        self.path = path
        self._targets = targets
        self._alone = part[1] == 1
        self._record = path / f"_{command}.json"
        self.work = path / f".{command}"
        self._name = f"part-{part[0]}-of-{part[1]}"
        self._lock = Lock(self.work / f"{self._name}.lock", "--to")

    def __enter__(self) -> "OutputDirectory":
        strange = None if self._record.exists() else first_data_file(self.path)
        if strange is not None:
            raise ConfigError(
                f"--to {self.path} holds other data: {strange.relative_to(self.path)}",
                hint="give a folder of its own with --to: a later command that reads it would read both",
            )
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
            message = f"{error.strerror or error}: {error.filename or self.path}"
            raise MachineError(message, hint="see to it and run the same command again") from error

    def compare(self, record: dict[str, Any]) -> list[str]:
        """Record how the output is begun, or compare with how it was begun before.

        Args:
            record: settings and fingerprints that the output depends on.

        Returns:
            Notices about differences that are allowed.

        Raises:
            ConfigError: it was begun differently.
        """
        before = read_json_object_or_none(self._record)
        if before is not None:
            return refuse_changes(before, record, self.path, "--to")
        # Under a name of its own first: other parts may begin at the same moment, with the same record.
        temporary = self.work / f"{self._name}.json"
        write_file(temporary, json.dumps(record, indent=2, allow_nan=False).encode() + b"\n")
        rename_durably(temporary, self._record)
        return []

    def is_written(self, key: str) -> bool:
        """Whether a file is written; files appear complete."""
        return self._targets[key].is_file()

    def clear(self) -> None:
        """Remove the work directory; with several parts, once the files of all of them are written."""
        if self._alone or all(target.is_file() for target in self._targets.values()):
            remove_tree(self.work)


ROW_GROUP_BYTES = 2**29
"""Arrow bytes at which a row group is split, so that it fits in memory."""

Change = Callable[[int, pa.RecordBatch], pa.RecordBatch]
"""From a piece's first row in the file and its rows to the rows to write."""


def copy_shard(shard: Shard, target: Path, schema: pa.Schema, change: Change, stop: StopRequest) -> Iterator[int]:
    """Write a shard's rows, changed, to another path.

    Row groups have the bounds of the original; those of more than 512 MiB in memory are split.

    Args:
        shard: the file to read; all its columns are.
        target: the file to write.
        schema: of the changed rows.
        change: makes them.
        stop: checked between pieces.

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


def needs_of_fit(shards: Sequence[Shard], renames: dict[str, str], written: Sequence[str] = ()) -> dict[str, Any]:
    """Settings that `fit` needs for copies of some shards, by the columns of the first: name -> value.

    A rename of what `fit` does not read would be an error there, and is left out.

    Args:
        shards: the originals.
        renames: canonical name -> column, from --column.
        written: canonical columns that the copies have besides.
    """
    needs = Needs(returns="where there", values=False, rewards="where there")
    columns = resolve_schema(schema_of(shards[0]), shards[0], renames=renames, labels=(), needs=needs)
    settings: dict[str, Any] = {}
    unread: tuple[str, ...] = ("rewards", "reward", "truncated")
    if columns.returns is None and "returns" not in written and (columns.rewards or columns.reward):
        settings["returns"], unread = "mc", ("returns", "truncated")
    if columns.values is None and "values" not in written:
        settings["old_values"] = "none"
    return settings | {"column": [f"{name}={column}" for name, column in renames.items() if name not in unread]}


def target_paths(shards: list[Shard], sources: list[str], directory: Path) -> dict[str, Path]:
    """The path each shard is written to: its name relative to the folder that all of them share.

    Args:
        shards: from `find_shards`.
        sources: the folders and files that they come from (`--data`).
        directory: the folder to write to.

    Returns:
        Shard name -> path.

    Raises:
        ConfigError: a shard would be replaced, or DIRECTORY is inside a source.
    """
    folder = os.path.commonpath([os.path.dirname(absolute_path(shard.path)) for shard in shards])
    target = directory.resolve()
    for source in sources:
        if os.path.isdir(source) and target.is_relative_to(Path(source).resolve()):
            raise ConfigError(
                f"--to {directory} is inside {source}, which is read: the same command would then read its own output",
                hint="give a folder beside it",
            )
    targets = {shard.name: directory / os.path.relpath(absolute_path(shard.path), folder) for shard in shards}
    for shard in shards:
        if os.path.realpath(targets[shard.name]) == os.path.realpath(shard.path):
            raise ConfigError(
                f"{shard.name} would be overwritten by its own copy", hint="give another folder with --to"
            )
    return targets
