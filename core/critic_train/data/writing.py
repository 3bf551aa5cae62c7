"""Writing shards: rollouts as Arrow columns, canonical encodings, row groups and files of bounded size.

A file appears under its name when it is complete; until then it has a hidden temporary name.
"""

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from critic_train.run.storage import make_directory, remove, rename_durably, sync_file

TOKEN_COLUMNS = {
    "input_ids": pa.list_(pa.int32()),
    "response_mask": pa.list_(pa.bool_()),
    "values": pa.list_(pa.float32()),
    "returns": pa.list_(pa.float32()),
    "rewards": pa.list_(pa.float32()),
    "advantages": pa.list_(pa.float32()),
}
"""One number a token, aligned to the token it pairs with, as long as the rollout."""

ROLLOUT_COLUMNS = {"reward": pa.float64(), "truncated": pa.bool_()}
"""One entry a rollout."""


def rollout_table(
    offsets: NDArray[np.int64], tokens: dict[str, NDArray[Any]], rollouts: dict[str, Any] | None = None
) -> pa.Table:
    """Ragged numpy columns as a table with the canonical names' types.

    Args:
        offsets: int64 [n+1]; rollout i owns tokens offsets[i]:offsets[i+1].
        tokens: name of TOKEN_COLUMNS -> [T], cast to the column's type; `input_ids` and `response_mask` among them.
        rollouts: name -> one entry a rollout [n]: uid, task, reward, truncated, step, ...; a list, an array, or an
            Arrow array, in whatever type it has unless ROLLOUT_COLUMNS says one.

    Returns:
        Columns in the order: uid and the other rollout columns as given, then the token columns.

    Raises:
        ValueError: a column is not as long as the offsets say.
    """
    columns: dict[str, pa.Array] = {}
    count = len(offsets) - 1
    for name, entries in (rollouts or {}).items():
        columns[name] = pa.array(entries, type=ROLLOUT_COLUMNS.get(name))
        if len(columns[name]) != count:
            raise ValueError(f"{name}: {len(columns[name])} entries for {count} rollouts")
    for name, flat in tokens.items():
        if len(flat) != offsets[-1]:
            raise ValueError(f"{name}: {len(flat)} entries for {offsets[-1]} tokens")
        columns[name] = token_column(flat, offsets, TOKEN_COLUMNS[name])
    return pa.table(columns)


def token_column(flat: NDArray[Any], offsets: NDArray[np.int64], kind: pa.DataType) -> pa.ListArray:
    """A ragged column as a list array.

    Args:
        flat: [T], the lists end to end.
        offsets: int64 [n+1].
        kind: the list's type, with 32-bit offsets.

    Raises:
        ValueError: more than 2^31 - 1 tokens at once.
    """
    if len(flat) > np.iinfo(np.int32).max:
        raise ValueError(f"{len(flat):,} tokens are too many for one batch")
    items = pa.array(np.ascontiguousarray(flat, dtype=numpy_dtype(kind.value_type)), type=kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), items).cast(kind)


def numpy_dtype(kind: pa.DataType) -> np.dtype[Any]:
    """numpy's name of a type of numbers or booleans. (pyarrow's own answer needs pandas up to pyarrow 22.)"""
    if pa.types.is_boolean(kind):
        return np.dtype(np.bool_)
    letter = "f" if pa.types.is_floating(kind) else "u" if pa.types.is_unsigned_integer(kind) else "i"
    return np.dtype(f"{letter}{kind.bit_width // 8}")


ROW_GROUP_BYTES = 32 * 2**20
"""Arrow bytes at which a row group is written."""
ROW_GROUP_ROWS = 2**16
SHARD_BYTES = 512 * 2**20
"""Arrow bytes at which the next shard is begun; a fifth to a third of it on disk."""
LARGEST_GROUP = 4
"""A prompt group of more row groups' bytes than this is cut: it must fit in memory."""


class ShardFile:
    """One Parquet file while it is being written; it stands when the `with` block ends without an error.

    zstd; BYTE_STREAM_SPLIT for floats; a dictionary for columns that hold one string or integer a rollout (uids,
    labels, steps); none for token ids, which zstd packs closer without; checksums on all pages.

    Args:
        path: where the file will stand; what stands there is replaced. Its folder is made.
        schema: of everything that will be written.

    Attributes:
        rows: rows written.
        arrow_bytes: what they weigh in memory.

    Raises:
        OSError: the disk is full or not writable.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.rows = 0
        self.arrow_bytes = 0
        self._schema = schema
        self._abandoned = False
        self._temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")

    def __enter__(self) -> "ShardFile":
        make_directory(self.path.parent, exist_ok=True)
        self._sink = pa.OSFile(str(self._temporary), "wb")
        self._writer = pq.ParquetWriter(
            self._sink,
            self._schema,
            compression="zstd",
            use_dictionary=[path for path, kind in _leaves(self._schema) if _is_key(path, kind)],
            use_byte_stream_split=[path for path, kind in _leaves(self._schema) if pa.types.is_floating(kind)],
            write_page_checksum=True,
        )
        return self

    def write_row_group(self, rows: pa.Table | pa.RecordBatch) -> None:
        """Write rows as one row group, however many they are; none where there are no rows."""
        table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
        if table.num_rows:
            self._writer.write_table(table, row_group_size=table.num_rows)
            self.rows += table.num_rows
            self.arrow_bytes += table.nbytes

    def abandon(self) -> None:
        """Leave nothing behind when the `with` block ends."""
        self._abandoned = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._writer.close()
            self._sink.close()
            if error is None and not self._abandoned:
                sync_file(self._temporary)
                rename_durably(self._temporary, self.path)
        finally:
            remove(self._temporary)


class ShardWriter:
    """Shards `PREFIX-00000.parquet`, `PREFIX-00001.parquet`, ... of a stream of rows, in its order.

    The last shard stands when the `with` block ends without an error; the ones before it stand as soon as they are
    full. Memory holds one row group. To keep the row groups of another file, write one `ShardFile` a file instead.

    Args:
        directory: where the shards go; made where it is missing.
        schema: of everything that will be written.
        keep_together: a column; neighbouring rows with equal entries are not cut apart by the end of a row group or
            shard (unless they alone weigh several row groups). Rows whose entry is null stand alone.
        prefix: what the shards' names begin with.
        first: the number of the first shard.
        row_group_bytes: Arrow bytes at which a row group ends.
        shard_bytes: Arrow bytes at which a shard ends.

    Attributes:
        files: the shards that stand, in order.
        rows: rows handed over.

    Raises:
        OSError: the disk is full or not writable.
    """

    def __init__(
        self,
        directory: str | Path,
        schema: pa.Schema,
        *,
        keep_together: str | None = None,
        prefix: str = "part",
        first: int = 0,
        row_group_bytes: int = ROW_GROUP_BYTES,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.files: list[Path] = []
        self.rows = 0
        self._directory = Path(directory)
        self._schema = schema
        self._keep_together = keep_together
        self._prefix = prefix
        self._first = first
        self._row_group_bytes = row_group_bytes
        self._shard_bytes = shard_bytes
        self._pending: list[pa.RecordBatch] = []
        self._pending_bytes = self._pending_rows = 0
        self._file: ShardFile | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def write(self, rows: pa.Table | pa.RecordBatch) -> None:
        """Add rows; columns are put into the schema's order."""
        table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
        for batch in table.select(self._schema.names).cast(self._schema).to_batches():
            self._pending.append(batch)
            self._pending_bytes += batch.nbytes
            self._pending_rows += batch.num_rows
            self.rows += batch.num_rows
            while self._is_full() and self._write_pending():
                pass

    def abandon(self) -> None:
        """Leave out what is not in a full shard yet."""
        self._pending = []
        if self._file is not None:
            self._file.abandon()
            file, self._file = self._file, None
            file.__exit__(None, None, None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            while self._pending and self._write_pending(last=True):
                pass
        self._end_shard(kind, error, trace)

    def _is_full(self) -> bool:
        return self._pending_bytes >= self._row_group_bytes or self._pending_rows >= ROW_GROUP_ROWS

    def _write_pending(self, *, last: bool = False) -> bool:
        """Write the rows that wait, up to where they may be cut; whether any were."""
        table = pa.Table.from_batches(self._pending, schema=self._schema)
        cut = table.num_rows if last else self._cut(table)
        if not cut:
            return False
        if self._file is None:
            path = self._directory / f"{self._prefix}-{self._first + len(self.files):05d}.parquet"
            self._file = ShardFile(path, self._schema).__enter__()
        self._file.write_row_group(table.slice(0, cut))
        if self._file.arrow_bytes >= self._shard_bytes:
            self._end_shard(None, None, None)
        rest = table.slice(cut)
        self._pending = rest.to_batches() if rest.num_rows else []
        self._pending_bytes, self._pending_rows = rest.nbytes if rest.num_rows else 0, rest.num_rows
        return True

    def _cut(self, table: pa.Table) -> int:
        """How many rows the next row group takes; 0 where more must come first."""
        row_bytes = max(1, table.nbytes // table.num_rows)
        wanted: int = max(1, min(ROW_GROUP_ROWS, self._row_group_bytes // row_bytes, table.num_rows))
        if self._keep_together is None:
            return wanted
        starts = run_starts(table.column(self._keep_together))[1:]
        before = starts[starts <= wanted]
        if len(before):
            return int(before[-1])
        # One group is larger than a row group: it gets one of its own, as soon as its end is in sight.
        if len(starts):
            return int(starts[0])
        return int(table.num_rows) if table.nbytes >= LARGEST_GROUP * self._row_group_bytes else 0

    def _end_shard(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.__exit__(kind, error, trace)
            if error is None:
                self.files.append(file.path)


def run_starts(keys: pa.ChunkedArray) -> NDArray[np.int64]:
    """Rows at which a run of equal entries begins, int64 [runs]; a null is a run of its own."""
    n = len(keys)
    if not n:
        return np.zeros(0, dtype=np.int64)
    differs = pc.fill_null(pc.not_equal(keys.slice(1), keys.slice(0, n - 1)), True)
    return np.concatenate([[0], np.flatnonzero(differs.to_numpy()) + 1]).astype(np.int64)


def _leaves(schema: pa.Schema) -> list[tuple[str, pa.DataType]]:
    """(path, type) of every column as Parquet counts them: `returns.list.element`, `uid`."""
    return [leaf for field in schema for leaf in _leaves_of(field.name, field.type)]


def _leaves_of(path: str, kind: pa.DataType) -> list[tuple[str, pa.DataType]]:
    if pa.types.is_struct(kind):
        return [leaf for field in kind for leaf in _leaves_of(f"{path}.{field.name}", field.type)]
    if pa.types.is_map(kind):
        key, item = _leaves_of(f"{path}.key_value.key", kind.key_type), kind.item_type
        return key + _leaves_of(f"{path}.key_value.value", item)
    if hasattr(kind, "value_type") and not pa.types.is_dictionary(kind):
        return _leaves_of(f"{path}.list.element", kind.value_type)
    return [(path, kind)]


def _is_key(path: str, kind: pa.DataType) -> bool:
    """One string, integer or dictionary entry a rollout."""
    if pa.types.is_dictionary(kind):
        return True
    texts = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return "." not in path and bool(texts or pa.types.is_integer(kind))
