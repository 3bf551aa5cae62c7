"""Write a shard again, its rows changed on the way: same name, same row groups, one row group in memory."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from critic_train.data.decoding import damaged, pieces, refuse_giants
from critic_train.data.places import parquet_file
from critic_train.data.shards import Shard, place_of
from critic_train.data.writing import ShardFile
from critic_train.errors import ConfigError
from critic_train.stopping import StopRequest

ROW_GROUP_BYTES = 2**29
"""Arrow bytes at which a row group is cut in two: it must fit in memory, whoever wrote the file."""

Change = Callable[[int, pa.RecordBatch], pa.RecordBatch]
"""From a piece's first row in the file and its rows to the rows to write."""


class CopyStoppedError(Exception):
    """Somebody asked the job to stop; the file does not stand."""


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
        CopyStoppedError: asked to stop.
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
            if stop.requested:
                raise CopyStoppedError
            refuse_giants(shard, piece)
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


def places(shards: list[Shard], sources: list[str], directory: Path) -> dict[str, Path]:
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
    folder = os.path.commonpath([os.path.dirname(place_of(shard.path)) for shard in shards])
    target = directory.resolve()
    for source in sources:
        if os.path.isdir(source) and target.is_relative_to(Path(source).resolve()):
            raise ConfigError(
                f"--to {directory} lies in {source}, which is read: the same command would then read its own output",
                hint="give a folder beside it",
            )
    found = {shard.name: directory / os.path.relpath(place_of(shard.path), folder) for shard in shards}
    for shard in shards:
        if os.path.realpath(found[shard.name]) == os.path.realpath(shard.path):
            raise ConfigError(
                f"{shard.name} would be replaced by what is made of it", hint="give another folder with --to"
            )
    return found
