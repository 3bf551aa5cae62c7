"""Stream rollouts out of Parquet shards, checked, in file order, in bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from critic_train.data.bad_rows import BadRow, BadRows
from critic_train.data.checking import CheckedBatch, RowLimits, check_batch
from critic_train.data.columns import Columns, understand
from critic_train.data.labels import label_column, label_kind, prompt_keys, uid_keys
from critic_train.data.shards import Shard
from critic_train.errors import DataError
from critic_train.rollouts import Rollouts, offsets_of
from critic_train.settings import OnBadRows

__all__ = ["RolloutReader", "RowLimits"]

FIRST_ROWS = 64
"""Rows decoded at once, at most: one look at a batch's weight comes after so many."""
MOST_ROWS = 8192
BATCH_BYTES = 16 * 2**20
"""Arrow bytes at which a batch of rows is full."""
BUFFER_BYTES = 2**18
"""What is read of a column's pages ahead of decoding; without it a whole column of a row group is."""
ELEMENT_BYTES = 8
MOST_ELEMENTS = 2**26
"""Elements of one list on average above which a row group is refused: no context is as long, and a file of a few
hundred bytes can claim it."""


class RolloutReader:
    """Rollouts of some shards. Every iteration starts from the first row.

    Args:
        shards: from `find_shards`.
        renames: canonical name -> column, from --column.
        on_bad_rows: "fail" raises, after all rows were read, a DataError that counts every bad row; "skip" leaves
            them out, and raises only where no good one is left.
        limits: what the model can take.
        labels: per-rollout columns to carry in `Rollouts.labels`.
        need_values: whether a shard without values is an error. Where it is none, values are kept only if every
            shard has them.

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
        # A shard without rows says nothing, and its columns often have no type.
        plans = [self._understand(shard) for shard in self.shards if shard.num_rows]
        has_values = self._all_have_values(plans)
        text_labels = _text_labels(plans)
        for plan in plans:
            for row_group, first_row, batch in _batches(plan):
                checked = check_batch(batch, plan.columns, self._limits)
                self._record(plan.shard, row_group, first_row, checked)
                rollouts = _rollouts(batch, plan.columns, checked, row, has_values, text_labels)
                row += batch.num_rows
                if len(rollouts):
                    good += len(rollouts)
                    yield rollouts
        if self.bad_rows.count and (self._on_bad_rows == "fail" or not good):
            raise self.bad_rows.error(all_of_them=not good)

    def _understand(self, shard: Shard) -> "_Plan":
        try:
            with pq.ParquetFile(shard.path) as file:
                schema, footer = file.schema_arrow, file.metadata
                columns = understand(
                    schema, shard, renames=self._renames, labels=self._labels, need_values=self._need_values
                )
                nullable = frozenset(name for name in self._labels if _may_be_null(footer, name))
        except (OSError, pa.ArrowException) as error:
            raise _damaged(shard, error) from error
        self._said.update(dict.fromkeys(columns.notices()))
        kinds = {name: label_kind(schema.field(name).type) for name in self._labels}
        text_uid = columns.uid is not None and label_kind(schema.field(columns.uid).type) == "text"
        return _Plan(shard=shard, columns=columns, text_uid=text_uid, label_kinds=kinds, nullable_labels=nullable)

    def _all_have_values(self, plans: list["_Plan"]) -> bool:
        without = [plan.shard.name for plan in plans if plan.columns.values is None]
        if without and len(without) < len(plans):
            self._said.setdefault(
                f"{len(without)} of {len(plans)} files have no values ({without[0]} first): none are used"
            )
        return not without

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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """How one shard is read."""

    shard: Shard
    columns: Columns
    text_uid: bool
    label_kinds: dict[str, str]
    nullable_labels: frozenset[str]


def _text_labels(plans: list[_Plan]) -> frozenset[str]:
    """Labels that must be text throughout: somewhere an entry is missing, or files differ in type."""
    names = {name for plan in plans for name in plan.label_kinds}
    return frozenset(
        name
        for name in names
        if any(name in plan.nullable_labels for plan in plans) or len({plan.label_kinds[name] for plan in plans}) > 1
    )


def _may_be_null(footer: pq.FileMetaData, name: str) -> bool:
    """Whether a flat column may hold nulls, by the footer's statistics."""
    at = footer.schema.names.index(name) if name in footer.schema.names else -1
    for row_group in range(footer.num_row_groups):
        statistics = footer.row_group(row_group).column(at).statistics if at >= 0 else None
        if statistics is None or not statistics.has_null_count or statistics.null_count:
            return True
    return False


def _batches(plan: _Plan) -> Iterator[tuple[int, int, pa.RecordBatch]]:
    """(row group, first row within it, rows)."""
    names = plan.columns.names()
    # A uid that repeats is kept once, however long it is.
    uids = [plan.columns.uid] if plan.columns.uid is not None and plan.text_uid else []
    try:
        with pq.ParquetFile(
            plan.shard.path,
            page_checksum_verification=True,
            pre_buffer=False,
            buffer_size=BUFFER_BYTES,
            read_dictionary=uids,
        ) as file:
            for row_group in range(file.metadata.num_row_groups):
                first_row = 0
                rows = _rows_at_once(file.metadata.row_group(row_group), row_group, names, plan.shard)
                for batch in _filled(file.iter_batches(batch_size=rows, row_groups=[row_group], columns=names)):
                    yield row_group, first_row, batch
                    first_row += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        raise _damaged(plan.shard, error) from error


def _rows_at_once(footer: pq.RowGroupMetaData, row_group: int, names: list[str], shard: Shard) -> int:
    """How many rows of a row group are decoded at once, by what its footer says of its size."""
    columns = [footer.column(i) for i in range(footer.num_columns)]
    read = [column for column in columns if column.path_in_schema.split(".", 1)[0] in names]
    rows = max(1, footer.num_rows)
    longest = max((column.num_values // rows for column in read), default=0)
    if longest > MOST_ELEMENTS:
        raise DataError(
            f"{shard.name}, row group {row_group}: found lists of {longest:,} elements on average, "
            f"expected at most {MOST_ELEMENTS:,}",
            hint="no rollout is as long; check the file, or take it out of --data",
        )
    weight = max(1, sum(column.num_values for column in read) * ELEMENT_BYTES // rows)
    return int(min(FIRST_ROWS, max(1, BATCH_BYTES // weight)))


def _filled(pieces: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Pieces put together until they weigh BATCH_BYTES or are MOST_ROWS rows."""
    pending: list[pa.RecordBatch] = []
    weight = rows = 0
    for piece in pieces:
        pending.append(piece)
        weight += piece.nbytes
        rows += piece.num_rows
        if weight >= BATCH_BYTES or rows >= MOST_ROWS:
            yield pa.concat_batches(pending)
            pending, weight, rows = [], 0, 0
    if pending:
        yield pa.concat_batches(pending)


def _rollouts(
    batch: pa.RecordBatch,
    columns: Columns,
    checked: CheckedBatch,
    first_row: int,
    keep_values: bool,
    text_labels: frozenset[str],
) -> Rollouts:
    """The good rows of a batch."""
    n = batch.num_rows
    whole = Rollouts(
        input_ids=checked.input_ids,
        offsets=offsets_of(checked.lengths),
        response_mask=checked.response_mask,
        returns=checked.returns,
        values=checked.values if keep_values else None,
        group=np.zeros(n, dtype=np.int64),
        row=np.arange(first_row, first_row + n, dtype=np.int64),
        labels={name: label_column(batch.column(name), as_text=name in text_labels) for name in columns.labels},
    )
    good = np.flatnonzero(~checked.faults.bad)
    kept = whole if len(good) == n else whole.take(good)
    if columns.uid is None:
        kept.group[:] = prompt_keys(kept)
    else:
        keys, known = (part[good] for part in uid_keys(batch.column(columns.uid)))
        kept.group[:] = keys if known.all() else np.where(known, keys, prompt_keys(kept))
    return kept


def _damaged(shard: Shard, error: BaseException) -> DataError:
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(f"{shard.name} is damaged: {why}", hint="copy the file again, or take it out of --data")
