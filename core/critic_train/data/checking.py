"""Turn one batch of raw rows into rollouts, and find the rows that cannot be.

Everything is done on whole columns. A row gets one fault: the first that is found.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from critic_train.data.aligning import Aligner, Tokens, read_tokens
from critic_train.data.columns import Columns
from critic_train.data.faults import Faults
from critic_train.data.ragged import counts_of, first_of, rows_with
from critic_train.rollouts import offsets_of, spread

FLOAT32_MAX = float(np.finfo(np.float32).max)
INT32_END = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLimits:
    """What the model can take; None where there is no limit.

    Attributes:
        vocab_size: ids must be below it.
        max_length: tokens a rollout may have.
    """

    vocab_size: int | None = None
    max_length: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedBatch:
    """Token-aligned columns of a batch, padding left out; rows that `faults` marks hold anything.

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
    faults = Faults(batch.num_rows)
    tokens = read_tokens(batch, columns, faults)
    aligner = Aligner(batch=batch, lengths=tokens.lengths, faults=faults)
    mask, response_start = aligner.response_mask(columns.response_mask, tokens.prompt_lengths)
    seen = None
    if columns.attention_mask is not None:
        seen = aligner.attention_mask(columns.attention_mask)
        mask = mask & seen
    lengths = tokens.lengths if seen is None else counts_of(seen, tokens.lengths)
    _check_ids(tokens, seen, columns, limits, faults)
    _check_lengths(lengths, columns, limits, faults)
    _check_mask(mask, seen, tokens.lengths, columns, faults)
    returns = _finite(aligner.numbers(columns.returns, response_start), mask, tokens.lengths, columns.returns, faults)
    values = None
    if columns.values is not None:
        column = aligner.numbers(columns.values, response_start)
        values = _finite(column, mask, tokens.lengths, columns.values, faults)
    kept = slice(None) if seen is None else seen
    return CheckedBatch(
        input_ids=tokens.ids[kept].astype(np.int32, copy=False),
        lengths=lengths,
        response_mask=mask[kept],
        returns=returns[kept],
        values=None if values is None else values[kept],
        faults=faults,
        response_aligned=aligner.response_aligned,
    )


def _check_ids(
    tokens: Tokens, seen: NDArray[np.bool_] | None, columns: Columns, limits: RowLimits, faults: Faults
) -> None:
    """Mark rows with ids that the model has no embedding for. What pads a row may be anything."""
    ids = tokens.ids
    end = INT32_END if limits.vocab_size is None else limits.vocab_size
    if not len(ids) or (ids.min() >= 0 and ids.max() < end):
        return
    outside = (ids < 0) | (ids >= end)
    if seen is not None:
        outside &= seen
    first = offsets_of(tokens.lengths)[:-1] + first_of(outside, tokens.lengths)
    expected = f"ids from 0 to {end - 1}" + ("" if limits.vocab_size is None else " (the model's vocabulary)")

    def mark(where: NDArray[np.bool_], name: str | None) -> None:
        rows = rows_with(where, tokens.lengths)
        faults.mark(
            rows, name or "", "token ids outside the vocabulary", lambda row: f"token id {ids[first[row]]}", expected
        )

    if tokens.prompt_lengths is None:
        mark(outside, columns.input_ids)
    else:
        places = spread(np.zeros_like(tokens.lengths), tokens.lengths)
        mark(outside & (places < np.repeat(tokens.prompt_lengths, tokens.lengths)), columns.prompts)
        mark(outside, columns.responses)


def _check_lengths(lengths: NDArray[np.int64], columns: Columns, limits: RowLimits, faults: Faults) -> None:
    if columns.attention_mask is not None:
        faults.mark(lengths == 0, columns.attention_mask, "no tokens", lambda _: "padding only", "a 1 on every token")
    if limits.max_length is not None:
        faults.mark(
            lengths > limits.max_length,
            columns.input_ids or columns.responses or "",
            "more tokens than the model's context",
            lambda row: f"{lengths[row]} tokens",
            f"at most {limits.max_length} (the model's context)",
        )


def _check_mask(
    mask: NDArray[np.bool_],
    seen: NDArray[np.bool_] | None,
    lengths: NDArray[np.int64],
    columns: Columns,
    faults: Faults,
) -> None:
    name = columns.response_mask or columns.responses or ""
    first = first_of(mask, lengths)
    faults.mark(
        first == lengths, name, "nothing to train on", lambda _: "no response token", "a 1 on at least one token"
    )
    faults.mark(
        first == (0 if seen is None else first_of(seen, lengths)),
        name if columns.prompts is None else columns.prompts,
        "no prompt",
        lambda _: "a response token in first place",
        "at least one token before the response: its state carries the first value",
    )


def _finite(
    column: NDArray[Any], mask: NDArray[np.bool_], lengths: NDArray[np.int64], name: str, faults: Faults
) -> NDArray[np.float32]:
    """float32 [T], 0 off the mask. Marks rows with NaN, infinities and what float32 cannot hold, on the mask."""
    wide = column.dtype == np.float64
    numbers = column if wide else column.astype(np.float32, copy=False)
    # What stands off the mask means nothing, and many dumps pad it with NaN.
    numbers = np.where(mask, numbers, numbers.dtype.type(0))
    # NaN compares false.
    finite = np.abs(numbers) <= FLOAT32_MAX if wide else np.isfinite(numbers)
    if not finite.all():
        odd = ~finite
        first = offsets_of(lengths)[:-1] + first_of(odd, lengths)
        faults.mark(
            rows_with(odd, lengths),
            name,
            "NaN or infinite numbers",
            lambda row: f"{column[first[row]]} on a response token",
            "a finite float32 number",
        )
        numbers[odd] = 0.0
    return numbers.astype(np.float32, copy=False)
