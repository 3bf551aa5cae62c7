"""Stream rollouts out of Parquet shards, checked, in file order, in bounded memory."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from critic_train.data.bad_rows import BadRow, BadRows
from critic_train.data.checking import CheckedBatch, RowLimits, check_batch
from critic_train.data.columns import Columns, understand
from critic_train.data.shards import Shard
from critic_train.errors import DataError
from critic_train.rollouts import Rollouts
from critic_train.settings import OnBadRows

__all__ = ["RolloutReader", "RowLimits"]

FIRST_ROWS = 64
MOST_ROWS = 8192
BATCH_BYTES = 16 * 2**20
"""Arrow bytes that a batch of rows aims at; the number of rows follows what the last batch weighed."""


class RolloutReader:
    """Rollouts of some shards. Every iteration starts from the first row.

    Args:
        shards: from `find_shards`.
        renames: canonical name -> column, from --column.
        on_bad_rows: "fail" raises, after all rows were read, a DataError that counts every bad row; "skip" leaves
            them out.
        limits: what the model can take.
        labels: per-rollout columns to carry in `Rollouts.labels`.
        need_values: whether a shard without values is an error.

    Attributes:
        bad_rows: those of the iteration under way or just ended.
        notices: what was understood without being said, in sentences.

    Raises:
        DataError: from iteration: a column is missing or of the wrong type, pages are damaged, rows are bad.
    """

    def __init__(
        self,
        shards: list[Shard],
        *,
        renames: dict[str, str] | None = None,
        on_bad_rows: OnBadRows = "fail",
        limits: RowLimits | None = None,
        labels: list[str] | None = None,
        need_values: bool = True,
    ) -> None:
        self.shards = shards
        self.bad_rows = BadRows()
        self._renames = renames or {}
        self._on_bad_rows = on_bad_rows
        self._limits = limits or RowLimits()
        self._labels = tuple(labels or ())
        self._need_values = need_values
        self._said: dict[str, None] = {}

    @property
    def notices(self) -> list[str]:
        """Sentences, in the order they came up."""
        return list(self._said)

    def __iter__(self) -> Iterator[Rollouts]:
        self.bad_rows = BadRows()
        row = good = 0
        plans = [(shard, self._understand(shard)) for shard in self.shards]
        has_values = all(columns.values is not None for _, columns in plans)
        for shard, columns in plans:
            for row_group, first_row, batch in self._batches(shard, columns):
                checked = check_batch(batch, columns, self._limits)
                self._record(shard, row_group, first_row, checked)
                rollouts = _rollouts(batch, columns, checked, row, keep_values=has_values)
                row += batch.num_rows
                if len(rollouts):
                    good += len(rollouts)
                    yield rollouts
        if self.bad_rows.count and (self._on_bad_rows == "fail" or not good):
            raise self.bad_rows.error()

    def _understand(self, shard: Shard) -> Columns:
        try:
            schema = pq.read_schema(shard.path)
        except (OSError, pa.ArrowException) as error:
            raise _damaged(shard, error) from error
        columns = understand(schema, shard, renames=self._renames, labels=self._labels, need_values=self._need_values)
        self._said.update(dict.fromkeys(columns.notices()))
        return columns

    def _batches(self, shard: Shard, columns: Columns) -> Iterator[tuple[int, int, pa.RecordBatch]]:
        """(row group, first row within it, rows)."""
        rows = FIRST_ROWS
        try:
            with pq.ParquetFile(shard.path, page_checksum_verification=True, pre_buffer=False) as file:
                for row_group in range(file.metadata.num_row_groups):
                    first_row = 0
                    for batch in _adaptive(file, row_group, columns.names(), rows):
                        yield row_group, first_row, batch
                        first_row += batch.num_rows
                        rows = _next_rows(batch)
        except (OSError, pa.ArrowException) as error:
            raise _damaged(shard, error) from error

    def _record(self, shard: Shard, row_group: int, first_row: int, checked: CheckedBatch) -> None:
        for name in sorted(checked.response_aligned):
            self._said.setdefault(f"`{name}` is as long as the response: it is aligned to it")
        for row, (reason, column, found, expected) in sorted(checked.faults.found.items()):
            self.bad_rows.add(
                reason,
                BadRow(
                    file=shard.name,
                    row_group=row_group,
                    row=first_row + row,
                    column=column,
                    found=found,
                    expected=expected,
                ),
            )


def _adaptive(file: pq.ParquetFile, row_group: int, names: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    """The rows of a row group, a few at first, then as many as weigh BATCH_BYTES together."""
    pending: list[pa.RecordBatch] = []
    weight = 0
    for batch in file.iter_batches(batch_size=rows, row_groups=[row_group], columns=names):
        pending.append(batch)
        weight += batch.nbytes
        if weight >= BATCH_BYTES or sum(b.num_rows for b in pending) >= MOST_ROWS:
            yield _one(pending)
            pending, weight = [], 0
    if pending:
        yield _one(pending)


def _one(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    if len(batches) == 1:
        return batches[0]
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]


def _next_rows(batch: pa.RecordBatch) -> int:
    weight = max(1, batch.nbytes // max(1, batch.num_rows))
    return int(min(MOST_ROWS, max(1, BATCH_BYTES // 4 // weight)))


def _rollouts(
    batch: pa.RecordBatch, columns: Columns, checked: CheckedBatch, first_row: int, *, keep_values: bool
) -> Rollouts:
    """The good rows of a batch."""
    n = batch.num_rows
    offsets = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(checked.lengths, out=offsets[1:])
    whole = Rollouts(
        input_ids=checked.input_ids,
        offsets=offsets,
        response_mask=checked.response_mask,
        returns=checked.returns,
        values=checked.values if keep_values else None,
        group=np.zeros(n, dtype=np.int64),
        row=np.arange(first_row, first_row + n, dtype=np.int64),
        labels={name: _label(batch.column(name)) for name in columns.labels},
    )
    good = np.flatnonzero(~checked.faults.bad)
    kept = whole if len(good) == n else whole.take(good)
    if columns.uid is None:
        kept.group[:] = _prompt_keys(kept)
    else:
        keys, known = (part[good] for part in _uid_keys(batch.column(columns.uid)))
        kept.group[:] = keys if known.all() else np.where(known, keys, _prompt_keys(kept))
    return kept


def _uid_keys(column: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(int64 [n] keys, bool [n] whether the row has a uid). Only distinct uids are hashed."""
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    keys = np.asarray([_key(str(uid).encode()) for uid in encoded.dictionary.to_pylist()] or [0], dtype=np.int64)
    known = encoded.indices.is_valid().to_numpy(zero_copy_only=False)
    return keys[encoded.indices.fill_null(0).to_numpy(zero_copy_only=False)], known


def _prompt_keys(rollouts: Rollouts) -> NDArray[np.int64]:
    """int64 [n]: a key of the tokens before the first response token."""
    if not len(rollouts):
        return np.zeros(0, dtype=np.int64)
    at = np.flatnonzero(rollouts.response_mask)
    first = at[np.searchsorted(at, rollouts.offsets[:-1])]
    ids = rollouts.input_ids.tobytes()
    spans = zip(rollouts.offsets[:-1].tolist(), first.tolist(), strict=True)
    return np.asarray([_key(ids[4 * start : 4 * stop]) for start, stop in spans], dtype=np.int64)


def _key(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def _label(column: pa.Array) -> NDArray[Any]:
    """A per-rollout column as numpy; missing entries and mixed things as text."""
    if column.null_count or not (pa.types.is_primitive(column.type) or pa.types.is_boolean(column.type)):
        return np.asarray(["(none)" if item is None else str(item) for item in column.to_pylist()], dtype=np.str_)
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _damaged(shard: Shard, error: BaseException) -> DataError:
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(f"{shard.name} is damaged: {why}", hint="copy the file again, or take it out of --data")
