"""Batches of rows out of Parquet files, and of files of Arrow's own, as datasets' `save_to_disk` writes them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from critic_train.data.decoding import damaged, pieces, refuse_oversized_rows
from critic_train.data.shards import Shard, find_shards
from critic_train.errors import DataError

ARROW_ROWS = 1024
"""Rows of an Arrow file that are read at once."""


def parquet_batches(path: Path, name: str) -> tuple[int, Iterator[pa.RecordBatch]]:
    """How many rows a Parquet file has, and the rows.

    Raises:
        DataError: it is damaged.
    """
    (shard,) = find_shards([str(path)])
    shard = Shard(**{field: getattr(shard, field) for field in shard.__slots__} | {"name": name})
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise damaged(shard, error) from error
    return shard.num_rows, _decoded(shard, schema.names)


def _decoded(shard: Shard, names: list[str]) -> Iterator[pa.RecordBatch]:
    for piece in pieces(shard, names):
        refuse_oversized_rows(shard, piece)
        yield piece.rows


def arrow_batches(path: Path, name: str) -> tuple[int, Iterator[pa.RecordBatch]]:
    """How many rows an Arrow file has, 0 where that is unknown, and the rows; the file or the stream format.

    Raises:
        DataError: it is damaged.
    """
    mapped = pa.memory_map(str(path))
    is_file = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    try:
        reader = pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(name, error) from error
    return 0, _checked(reader, name, is_file=is_file)


def _checked(reader: Any, name: str, *, is_file: bool) -> Iterator[pa.RecordBatch]:
    try:
        for batch in (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader:
            batch.validate(full=True)
            yield from (batch.slice(start, ARROW_ROWS) for start in range(0, batch.num_rows, ARROW_ROWS))
    except (pa.ArrowException, OSError) as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> DataError:
    return DataError(f"{name}: the Arrow file is damaged ({str(error)[:120]})")
