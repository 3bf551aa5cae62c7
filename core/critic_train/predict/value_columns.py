"""The columns that `predict` computes, and the shards they are written to.

New columns are aligned to the tokens of the original rows, padding included; rows that could not be used get nulls.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from critic_train.data.alignment import Aligner, ragged, read_tokens
from critic_train.data.bad_input import RowErrors
from critic_train.data.column_types import list_item_type
from critic_train.data.copying import copy_shard, schema_of
from critic_train.data.returns import ReturnRecipe
from critic_train.data.schema import Columns, Needs, resolve_schema
from critic_train.data.shards import Shard
from critic_train.rollouts import Rollouts, offsets_from_lengths, ragged_take, repeat_by_length
from critic_train.settings import Written
from critic_train.stopping import StopRequest

EPSILON = 1e-8


@dataclass(slots=True)
class Whitening:
    """Shifts and scales to mean 0 and variance 1, as verl's masked_whiten does over a batch.

    Attributes:
        count: numbers added.
        mean: their mean.
        squares: sum of squared distances from it (Chan, Golub & LeVeque's update).
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, numbers: NDArray[np.float64]) -> None:
        """Take in numbers, float64 [k]."""
        if not len(numbers):
            return
        mean, total = float(numbers.mean()), self.count + len(numbers)
        apart = mean - self.mean
        self.squares += float(np.square(numbers - mean).sum()) + apart * apart * self.count * len(numbers) / total
        self.mean += apart * len(numbers) / total
        self.count = total

    def apply(self, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """The numbers, whitened; the variance is the sample's, over n - 1."""
        scale = (self.squares / max(1, self.count - 1) + EPSILON) ** -0.5
        return np.asarray((numbers - self.mean) * scale, dtype=np.float64)


KIND = pa.list_(pa.float32())


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnBatch:
    """New columns of some rollouts of a file.

    Attributes:
        row: int64 [n], rows in the file, ascending.
        offsets: int64 [n+1].
        columns: name -> float32 [T].
        present: name -> bool [n], rollouts that have an entry.
    """

    row: NDArray[np.int64]
    offsets: NDArray[np.int64]
    columns: dict[str, NDArray[np.float32]]
    present: dict[str, NDArray[np.bool_]]

    def take(self, index: NDArray[np.int64]) -> "ColumnBatch":
        """Those at the given positions."""
        tokens, offsets = ragged_take(self.offsets, index)
        return ColumnBatch(
            row=self.row[index],
            offsets=offsets,
            columns={name: column[tokens] for name, column in self.columns.items()},
            present={name: present[index] for name, present in self.present.items()},
        )


class ColumnStream:
    """A stream of new columns, taken by ranges of rows of the file.

    Args:
        batches: in the order of the file; rows that cannot be used are in none of them.
    """

    def __init__(self, batches: Iterator[ColumnBatch]) -> None:
        self._batches = batches
        self._pending: list[ColumnBatch] = []

    def upto(self, end: int) -> list[ColumnBatch]:
        """All remaining rows below `end`."""
        while not self._pending or self._pending[-1].row[-1] < end:
            batch = next(self._batches, None)
            if batch is None:
                break
            self._pending.append(batch)
        ready: list[ColumnBatch] = []
        rest: list[ColumnBatch] = []
        for batch in self._pending:
            cut = int(np.searchsorted(batch.row, end))
            ready += [batch.take(np.arange(cut))] if cut else []
            rest += [batch.take(np.arange(cut, len(batch.row)))] if cut < len(batch.row) else []
        self._pending = rest
        return ready


def with_columns(schema: pa.Schema, names: list[str]) -> pa.Schema:
    """A schema with lists of float32 under some names: in place where the name stands, else at the end."""
    for name in names:
        field = pa.field(name, KIND)
        at = schema.get_field_index(name)
        schema = schema.append(field) if at < 0 else schema.set(at, field)
    # It describes the original columns; `datasets` refuses files that have others.
    return schema.with_metadata({k: v for k, v in (schema.metadata or {}).items() if k != b"huggingface"} or None)


def with_new_columns(
    batch: pa.RecordBatch,
    schema: pa.Schema,
    names: dict[str, str],
    columns: Columns,
    first_row: int,
    new: list[ColumnBatch],
) -> pa.RecordBatch:
    """Rows of a file with new columns put in.

    A column is as long as the one it replaces, row by row; one that replaces none is as long as the response mask. So
    a shard whose values are as long as the response gets such values.

    Args:
        batch: rows of the file, all columns.
        schema: from `with_columns`.
        names: key in `ColumnBatch.columns` -> the column's name in the file.
        columns: the file's own columns.
        first_row: the row of the file in which the batch begins.
        new: the new columns of those of its rows that could be used.
    """
    n = batch.num_rows
    tokens = read_tokens(batch, columns, RowErrors(n))
    rows = _together([part.row - first_row for part in new], np.int64)
    at = np.zeros(n, dtype=np.bool_)
    at[rows] = True
    at = np.repeat(at, tokens.lengths)
    if columns.attention_mask is not None:
        aligner = Aligner(batch=batch, lengths=tokens.lengths, errors=RowErrors(n))
        at &= aligner.attention_mask(columns.attention_mask)
    arrays = list(batch.columns)
    for key, name in names.items():
        flat = np.zeros(len(at), dtype=np.float32)
        flat[at] = _together([part.columns[key] for part in new], np.float32)
        present = np.zeros(n, dtype=np.bool_)
        present[rows] = _together([part.present[key] for part in new], np.bool_)
        column = _lists(flat, tokens.lengths, _lengths_like(batch, name, columns, tokens.lengths), present)
        index = batch.schema.get_field_index(name)
        if index >= 0:
            arrays[index] = column
        else:
            arrays.append(column)
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _lengths_like(batch: pa.RecordBatch, name: str, columns: Columns, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [n], elements of each row: those of the column itself, else of the mask, where they fit the tokens."""
    for model in (name, columns.response_mask):
        if model in batch.schema.names and list_item_type(batch.schema.field(model).type) is not None:
            listed = ragged(batch.column(model)).lengths
            return np.where((listed > 0) & (listed <= lengths), listed, lengths)
    return lengths


def _lists(
    tokens: NDArray[np.float32], lengths: NDArray[np.int64], sizes: NDArray[np.int64], present: NDArray[np.bool_]
) -> pa.Array:
    """The last `sizes` tokens of each row as a list; null where `present` is false."""
    sizes = np.where(present, sizes, 0)
    flat = tokens[repeat_by_length(offsets_from_lengths(lengths)[1:] - sizes, sizes)]
    return pa.ListArray.from_arrays(
        pa.array(offsets_from_lengths(sizes), pa.int32()), pa.array(flat), mask=pa.array(~present)
    )


def _together(parts: list[NDArray[Any]], kind: type[np.generic]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewColumns:
    """Computes the new columns.

    Attributes:
        recipe: how returns and advantages are computed.
        written: the columns wanted.
    """

    recipe: ReturnRecipe
    written: tuple[Written, ...]

    @property
    def computes(self) -> bool:
        """Whether rewards are needed."""
        return any(name != "values" for name in self.written)

    def of(self, rollouts: Rollouts, values: NDArray[np.float32], whitening: Whitening | None) -> ColumnBatch:
        """The new columns of some rollouts. With --truncated drop, truncated ones get values only.

        Args:
            rollouts: with rewards where the recipe needs them.
            values: float32 [T], this critic's.
            whitening: of the advantages; None leaves them as they are.
        """
        everyone = np.ones(len(rollouts), dtype=np.bool_)
        columns: dict[str, NDArray[np.float32]] = {}
        for name in self.written:
            if name == "values":
                columns[name] = values
            elif name == "returns":
                columns[name] = self.recipe.returns(rollouts, values)
            else:
                advantages = self.recipe.advantages(rollouts, values)
                if whitening is not None:
                    advantages = np.where(rollouts.response_mask, whitening.apply(advantages), 0.0)
                columns[name] = advantages.astype(np.float32)
        targeted = self._targeted(rollouts)
        return ColumnBatch(
            row=rollouts.row,
            offsets=rollouts.offsets,
            columns=columns,
            present={name: everyone if name == "values" else targeted for name in self.written},
        )

    def advantages(self, rollouts: Rollouts, values: NDArray[np.float32]) -> NDArray[np.float64]:
        """float64, the advantages that whitening is over: of every response token that gets one."""
        counted = rollouts.response_mask & np.repeat(self._targeted(rollouts), rollouts.lengths)
        return self.recipe.advantages(rollouts, values)[counted]

    def _targeted(self, rollouts: Rollouts) -> NDArray[np.bool_]:
        """bool [n]: rollouts that get returns and advantages."""
        if self.recipe.truncated == "drop" and rollouts.truncated is not None:
            return ~rollouts.truncated
        return np.ones(len(rollouts), dtype=np.bool_)


def rewrite_with_columns(
    shard: Shard,
    target: Path,
    new: NewColumns,
    renames: dict[str, str],
    batches: Iterator[ColumnBatch],
    stop: StopRequest,
) -> Iterator[int]:
    """Write a shard again with new columns; see `copy_shard` for what it yields and raises.

    A new column has its canonical name, or the name that --column gives it; a column of that name is replaced.

    Args:
        shard: the file.
        target: where to write it.
        new: what is written.
        renames: canonical name -> column, from --column.
        batches: the new columns, in the file's order.
        stop: checked between pieces.
    """
    schema = schema_of(shard)
    columns = resolve_schema(schema, shard, renames=renames, labels=(), needs=Needs(returns=False, values=False))
    names: dict[str, str] = {name: renames.get(name, name) for name in new.written}
    written = with_columns(schema, list(names.values()))
    stream = ColumnStream(batches)

    def change(first_row: int, batch: pa.RecordBatch) -> pa.RecordBatch:
        return with_new_columns(batch, written, names, columns, first_row, stream.upto(first_row + batch.num_rows))

    return copy_shard(shard, target, written, change, stop)
