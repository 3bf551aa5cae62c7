"""Turn one batch of raw rows into rollouts, and find the rows that cannot be.

Everything is done on whole columns. A row gets one fault: the first that is found.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from critic_train.data.columns import Columns
from critic_train.data.ragged import Ragged, offsets_of, ragged, rows_with, side_by_side, spread

FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLimits:
    """What the model can take; None where there is no limit.

    Attributes:
        vocab_size: ids must be below it.
        max_length: tokens a rollout may have.
    """

    vocab_size: int | None = None
    max_length: int | None = None


@dataclass(slots=True)
class Faults:
    """Which rows of a batch are bad, and why.

    Attributes:
        bad: bool [n].
        found: row -> (reason, column, found, expected).
    """

    bad: NDArray[np.bool_]
    found: dict[int, tuple[str, str, str, str]] = field(default_factory=dict)

    def mark(
        self, rows: NDArray[np.bool_], column: str, reason: str, found: Callable[[int], str], expected: str
    ) -> None:
        """Mark the rows that are not marked yet."""
        for row in np.flatnonzero(rows & ~self.bad).tolist():
            self.found[row] = (reason, column, found(row), expected)
        self.bad |= rows


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedBatch:
    """Token-aligned columns of a batch; rows that `faults` marks hold anything.

    Attributes:
        input_ids: int32 [T].
        lengths: int64 [n].
        response_mask: bool [T].
        returns: float32 [T], 0 where the mask is false.
        values: float32 [T], 0 where the mask is false; None without the column.
        faults: the bad rows.
        response_aligned: names of columns that were as long as the response.
    """

    input_ids: NDArray[np.int32]
    lengths: NDArray[np.int64]
    response_mask: NDArray[np.bool_]
    returns: NDArray[np.float32]
    values: NDArray[np.float32] | None
    faults: Faults
    response_aligned: set[str]


def check_batch(batch: pa.RecordBatch, columns: Columns, limits: RowLimits) -> CheckedBatch:
    """Align every column to the tokens and check it.

    Args:
        batch: raw rows.
        columns: how the shard is understood.
        limits: what the model can take.
    """
    faults = Faults(bad=np.zeros(batch.num_rows, dtype=np.bool_))
    ids, response_start = _token_ids(batch, columns, faults)
    aligner = _Aligner(lengths=ids.lengths, faults=faults)
    mask, response_start = _response_mask(batch, columns, aligner, response_start)
    returns = aligner.align(batch, columns.returns, response_start)
    values = aligner.align(batch, columns.values, response_start) if columns.values else None
    if columns.attention_mask:
        seen = _zero_or_one(
            aligner.align(batch, columns.attention_mask, response_start), columns.attention_mask, aligner
        )
        ids = Ragged(flat=ids.flat[seen], lengths=_sums(seen, ids.lengths), null_rows=ids.null_rows)
        mask, returns = mask[seen], returns[seen]
        values = None if values is None else values[seen]
    id_column = columns.input_ids or columns.responses or ""
    _check_ids(ids, id_column, limits, faults)
    _check_mask(mask, ids.lengths, columns.response_mask or id_column, faults)
    return CheckedBatch(
        input_ids=ids.flat.astype(np.int32, copy=False),
        lengths=ids.lengths,
        response_mask=mask,
        returns=_numbers(returns, mask, ids.lengths, columns.returns, faults),
        values=None if values is None else _numbers(values, mask, ids.lengths, columns.values or "", faults),
        faults=faults,
        response_aligned=aligner.response_aligned,
    )


@dataclass(slots=True, kw_only=True)
class _Aligner:
    """Puts columns under the tokens they pair with.

    Attributes:
        lengths: int64 [n], tokens of each row.
        faults: of the batch.
        response_aligned: columns that were found to be as long as the response.
    """

    lengths: NDArray[np.int64]
    faults: Faults
    response_aligned: set[str] = field(default_factory=set)

    def align(self, batch: pa.RecordBatch, name: str, response_start: NDArray[np.int64]) -> NDArray[np.generic]:
        """A column over all tokens, 0 where it says nothing. Marks rows whose length fits neither way."""
        column = self.read(batch, name)
        response = self.lengths - response_start
        full = column.lengths == self.lengths
        short = ~full & (column.lengths == response)
        self.faults.mark(
            ~full & ~short,
            name,
            "lengths that disagree",
            lambda row: f"{column.lengths[row]} elements",
            "as many as the rollout or its response has tokens",
        )
        if short[~self.faults.bad].any():
            self.response_aligned.add(name)
        return self.place(column, np.where(short, response_start, 0), full | short)

    def read(self, batch: pa.RecordBatch, name: str) -> Ragged:
        """A column as it is. Marks null rows."""
        column = ragged(batch.column(name))
        self.faults.mark(column.null_rows, name, "nulls", lambda _: "null", "a number for every token")
        return column

    def place(self, column: Ragged, start: NDArray[np.int64], usable: NDArray[np.bool_]) -> NDArray[np.generic]:
        """A column over all tokens, beginning at `start` in each usable row."""
        placed = np.zeros(int(self.lengths.sum()), dtype=column.flat.dtype)
        origin = offsets_of(self.lengths)[:-1] + start
        if usable.all():
            placed[spread(origin, column.lengths)] = column.flat
        else:
            lengths = np.where(usable, column.lengths, 0)
            placed[spread(origin, lengths)] = column.flat[spread(column.offsets[:-1], lengths)]
        return placed


def _token_ids(batch: pa.RecordBatch, columns: Columns, faults: Faults) -> tuple[Ragged, NDArray[np.int64] | None]:
    """The ids of every row, and where its response starts if the schema says so."""
    if columns.input_ids is not None:
        ids = ragged(batch.column(columns.input_ids))
        name, start = columns.input_ids, None
    else:
        prompts, responses = ragged(batch.column(columns.prompts)), ragged(batch.column(columns.responses))
        ids, name, start = side_by_side(prompts, responses), columns.responses or "", prompts.lengths
    faults.mark(ids.null_rows, name, "nulls", lambda _: "null", "a token id for every token")
    faults.mark(ids.lengths == 0, name, "no tokens", lambda _: "an empty list", "at least two token ids")
    return ids, start


def _response_mask(
    batch: pa.RecordBatch, columns: Columns, aligner: _Aligner, start: NDArray[np.int64] | None
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """The mask over all tokens, and where each row's response starts."""
    total = aligner.lengths
    if columns.response_mask is None:
        assert start is not None, "without a mask the schema has prompts and responses"
        place = spread(np.zeros_like(total), total)
        return place >= np.repeat(start, total), start
    column = aligner.read(batch, columns.response_mask)
    short = column.lengths < total
    aligner.faults.mark(
        (column.lengths > total)
        | (column.lengths == 0)
        | (short & (start is not None) & (column.lengths != total - (start if start is not None else 0))),
        columns.response_mask,
        "lengths that disagree",
        lambda row: f"{column.lengths[row]} elements",
        "as many as the rollout or its response has tokens",
    )
    if short[~aligner.faults.bad].any():
        aligner.response_aligned.add(columns.response_mask)
    usable = ~aligner.faults.bad
    flat = aligner.place(column, np.where(short, total - column.lengths, 0), usable)
    mask = _zero_or_one(flat, columns.response_mask, aligner)
    if start is None:
        start = np.where(short, total - column.lengths, _first_true(mask, total))
    return mask, start


def _zero_or_one(flat: NDArray[np.generic], name: str, aligner: _Aligner) -> NDArray[np.bool_]:
    mask = flat.astype(np.bool_)
    if flat.dtype != np.bool_:
        odd = (flat != 0) & (flat != 1)
        if odd.any():
            offsets = offsets_of(aligner.lengths)
            aligner.faults.mark(
                rows_with(odd, aligner.lengths),
                name,
                "mask entries other than 0 and 1",
                lambda row: f"{flat[offsets[row] : offsets[row + 1]][odd[offsets[row] : offsets[row + 1]]][0]}",
                "0 or 1",
            )
    return mask


def _first_true(mask: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [n]: place of the first true element in each row; the row's length where there is none."""
    offsets = offsets_of(lengths)
    at = np.append(np.flatnonzero(mask), len(mask))
    first = at[np.searchsorted(at, offsets[:-1])]
    found: NDArray[np.int64] = np.minimum(first, offsets[1:]) - offsets[:-1]
    return found


def _sums(flags: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [n]: true elements of each row."""
    seen = np.zeros(len(flags) + 1, dtype=np.int64)
    np.cumsum(flags, out=seen[1:])
    offsets = offsets_of(lengths)
    return seen[offsets[1:]] - seen[offsets[:-1]]


def _check_ids(ids: Ragged, name: str, limits: RowLimits, faults: Faults) -> None:
    offsets = offsets_of(ids.lengths)
    top = limits.vocab_size if limits.vocab_size is not None else 2**31
    if len(ids.flat) and (ids.flat.min() < 0 or ids.flat.max() >= top):
        outside = (ids.flat < 0) | (ids.flat >= top)

        def worst(row: int) -> str:
            span = slice(offsets[row], offsets[row + 1])
            return f"token id {ids.flat[span][outside[span]][0]}"

        expected = f"ids from 0 to {top - 1}" + ("" if limits.vocab_size is None else " (the model's vocabulary)")
        faults.mark(rows_with(outside, ids.lengths), name, "token ids outside the vocabulary", worst, expected)
    if limits.max_length is not None:
        faults.mark(
            ids.lengths > limits.max_length,
            name,
            "more tokens than the model's context",
            lambda row: f"{ids.lengths[row]} tokens",
            f"at most {limits.max_length} (the model's context)",
        )


def _check_mask(mask: NDArray[np.bool_], lengths: NDArray[np.int64], name: str, faults: Faults) -> None:
    faults.mark(
        _sums(mask, lengths) == 0,
        name,
        "nothing to train on",
        lambda _: "no response token",
        "a 1 on at least one token",
    )
    first = np.zeros(len(lengths), dtype=np.bool_)
    some = lengths > 0
    first[some] = mask[offsets_of(lengths)[:-1][some]]
    faults.mark(
        first,
        name,
        "no prompt",
        lambda _: "a response token in first place",
        "at least one token before the response: its state carries the first value",
    )


def _numbers(
    flat: NDArray[np.generic], mask: NDArray[np.bool_], lengths: NDArray[np.int64], name: str, faults: Faults
) -> NDArray[np.float32]:
    """A float column as float32, 0 off the mask. Marks NaN and infinities on the mask."""
    numbers = flat.astype(np.float64 if flat.dtype == np.float64 else np.float32)
    with np.errstate(invalid="ignore"):
        odd = mask & ~(np.abs(numbers) <= FLOAT32_MAX)
    if odd.any():
        offsets = offsets_of(lengths)

        def first(row: int) -> str:
            span = slice(offsets[row], offsets[row + 1])
            return f"{numbers[span][odd[span]][0]} on a response token"

        faults.mark(rows_with(odd, lengths), name, "NaN or infinite numbers", first, "a finite float32 number")
    # What stands off the mask means nothing, and many dumps pad it with NaN.
    return np.where(mask & ~odd, numbers, 0.0).astype(np.float32)
