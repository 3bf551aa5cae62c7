"""Token columns back into rows: under the tokens they pair with, padding and all, null where nothing is known."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from critic_train.data.aligning import Aligner, read_tokens
from critic_train.data.columns import Columns
from critic_train.data.faults import Faults
from critic_train.data.ragged import ragged
from critic_train.rollouts import offsets_of, ragged_take, spread

KIND = pa.list_(pa.float32())


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """New columns of some rollouts of a file.

    Attributes:
        row: int64 [n], rows in the file, ascending.
        offsets: int64 [n+1].
        columns: name -> float32 [T].
        known: name -> bool [n], rollouts that have an entry there.
    """

    row: NDArray[np.int64]
    offsets: NDArray[np.int64]
    columns: dict[str, NDArray[np.float32]]
    known: dict[str, NDArray[np.bool_]]

    def take(self, index: NDArray[np.int64]) -> "Filled":
        """Those at the given positions."""
        tokens, offsets = ragged_take(self.offsets, index)
        return Filled(
            row=self.row[index],
            offsets=offsets,
            columns={name: column[tokens] for name, column in self.columns.items()},
            known={name: known[index] for name, known in self.known.items()},
        )


class FilledRows:
    """A stream of new columns, handed out by rows of the file.

    Args:
        pieces: in the order of the file; rows that cannot be used are in none of them.
    """

    def __init__(self, pieces: Iterator[Filled]) -> None:
        self._pieces = pieces
        self._held: list[Filled] = []

    def upto(self, end: int) -> list[Filled]:
        """All that is left of rows below `end`."""
        while not self._held or self._held[-1].row[-1] < end:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._held.append(piece)
        ready: list[Filled] = []
        rest: list[Filled] = []
        for piece in self._held:
            cut = int(np.searchsorted(piece.row, end))
            ready += [piece.take(np.arange(cut))] if cut else []
            rest += [piece.take(np.arange(cut, len(piece.row)))] if cut < len(piece.row) else []
        self._held = rest
        return ready


def with_columns(schema: pa.Schema, names: list[str]) -> pa.Schema:
    """A schema with lists of float32 under some names: in place where the name stands, else at the end."""
    for name in names:
        field = pa.field(name, KIND)
        at = schema.get_field_index(name)
        schema = schema.append(field) if at < 0 else schema.set(at, field)
    # It describes the columns that were there; `datasets` refuses files that have others.
    return schema.with_metadata({k: v for k, v in (schema.metadata or {}).items() if k != b"huggingface"} or None)


def filled_in(
    batch: pa.RecordBatch,
    schema: pa.Schema,
    names: dict[str, str],
    columns: Columns,
    first_row: int,
    filled: list[Filled],
) -> pa.RecordBatch:
    """Rows of a file with new columns put in.

    A column is as long as the one it replaces was, row by row; a new one is as long as the response mask. So a shard
    whose values are as long as the response gets such values.

    Args:
        batch: rows of the file, all columns.
        schema: from `with_columns`.
        names: key in `Filled.columns` -> the column's name in the file.
        columns: how the file is understood.
        first_row: the row of the file in which the batch begins.
        filled: the new columns of those of its rows that could be used.
    """
    n = batch.num_rows
    tokens = read_tokens(batch, columns, Faults(n))
    rows = _together([piece.row - first_row for piece in filled], np.int64)
    at = np.zeros(n, dtype=np.bool_)
    at[rows] = True
    at = np.repeat(at, tokens.lengths)
    if columns.attention_mask is not None:
        aligner = Aligner(batch=batch, lengths=tokens.lengths, faults=Faults(n))
        at &= aligner.attention_mask(columns.attention_mask)
    arrays = list(batch.columns)
    for key, name in names.items():
        whole = np.zeros(len(at), dtype=np.float32)
        whole[at] = _together([piece.columns[key] for piece in filled], np.float32)
        known = np.zeros(n, dtype=np.bool_)
        known[rows] = _together([piece.known[key] for piece in filled], np.bool_)
        new = _lists(whole, tokens.lengths, _lengths_like(batch, name, columns, tokens.lengths), known)
        place = batch.schema.get_field_index(name)
        if place >= 0:
            arrays[place] = new
        else:
            arrays.append(new)
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _lengths_like(batch: pa.RecordBatch, name: str, columns: Columns, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [n], elements of each row: those of the column itself, else of the mask, where they fit the tokens."""
    for model in (name, columns.response_mask):
        if model is not None and model in batch.schema.names and _is_list(batch.schema.field(model).type):
            found = ragged(batch.column(model)).lengths
            return np.where((found > 0) & (found <= lengths), found, lengths)
    return lengths


def _lists(
    whole: NDArray[np.float32], lengths: NDArray[np.int64], kept: NDArray[np.int64], known: NDArray[np.bool_]
) -> pa.Array:
    """The last `kept` tokens of each row as a list; null where nothing is known."""
    kept = np.where(known, kept, 0)
    flat = whole[spread(offsets_of(lengths)[1:] - kept, kept)]
    return pa.ListArray.from_arrays(pa.array(offsets_of(kept), pa.int32()), pa.array(flat), mask=pa.array(~known))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _together(parts: list[NDArray[Any]], kind: type[np.generic]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=kind)
