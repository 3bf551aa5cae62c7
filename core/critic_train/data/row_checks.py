"""Check one batch of raw rows and align its columns to the tokens; mark the rows that cannot be used.

All checks work on entire columns. A bad row is marked once, by the first check that it fails.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from critic_train.data.alignment import (
    Aligner,
    Tokens,
    booleans_of,
    carried_back,
    counts_of,
    first_of,
    numbers_of,
    on_last_token,
    read_tokens,
    rows_with,
)
from critic_train.data.bad_input import RowErrors
from critic_train.data.masks import response_mask, turn_ends, without_padding
from critic_train.data.schema import Columns, Need
from critic_train.rollouts import offsets_from_lengths, repeat_by_length

LARGEST = float(np.sqrt(np.finfo(np.float32).max))
"""Numbers may be so large: float32 holds their squares, of which the loss is made."""
INT32_END = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLimits:
    """What the model can take; None where there is no limit.

    Attributes:
        vocab_size: ids must be below it.
        max_length: tokens a rollout may have.
        placeholder_ids: ids in whose place a multimodal model puts features of images; rows have none of those.
        vocab_size_of, max_length_of: what sets the limit, for messages.
    """

    vocab_size: int | None = None
    max_length: int | None = None
    placeholder_ids: tuple[int, ...] = ()
    vocab_size_of: str = "the model's vocabulary"
    max_length_of: str = "the model's context"

    def at_most(self, max_length: int | None) -> "RowLimits":
        """These limits, with that of --max-length where it is set and the lower one."""
        if max_length is None or (self.max_length is not None and self.max_length <= max_length):
            return self
        return replace(self, max_length=max_length, max_length_of="--max-length")


FROM_SCRATCH = RowLimits(
    vocab_size=2**20, max_length=2**17, vocab_size_of="a model from scratch", max_length_of="a model from scratch"
)
"""The limits of a model made from scratch, which is sized by the data: one odd row must not make it huge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedBatch:
    """Token-aligned columns of a batch, without padding. The content of rows marked in `errors` is undefined.

    Attributes:
        input_ids: int32 [T].
        lengths: int64 [n].
        response_mask: bool [T].
        returns: float32 [T], 0 where the mask is false, and everywhere without the column.
        values: float32 [T], 0 where the mask is false; None without the column.
        rewards: float32 [T], 0 where the mask is false; None without a column, or where it has bad entries.
        truncated: bool [n]; None without the column.
        errors: the bad rows.
        notes: sentences on how columns were aligned.
        narrowest: of several masks, those that were the narrowest in every row.
    """

    input_ids: NDArray[np.int32]
    lengths: NDArray[np.int64]
    response_mask: NDArray[np.bool_]
    returns: NDArray[np.float32]
    values: NDArray[np.float32] | None
    rewards: NDArray[np.float32] | None
    truncated: NDArray[np.bool_] | None
    errors: RowErrors
    notes: tuple[str, ...]
    narrowest: frozenset[str]


def check_batch(
    batch: pa.RecordBatch,
    columns: Columns,
    limits: RowLimits,
    rewards: Need = "no",
    *,
    drop_truncated: bool = False,
    errors: RowErrors | None = None,
) -> CheckedBatch:
    """Align every column to the tokens and check it.

    Args:
        batch: raw rows.
        columns: the shard's columns.
        limits: what the model can take.
        rewards: whether bad rewards make a row bad ("yes"), or are ignored.
        errors: rows that are bad already.
        drop_truncated: whether truncated rollouts will be left out; they are not checked then.
    """
    errors = RowErrors(batch.num_rows) if errors is None else errors
    truncated = None
    if columns.truncated is not None:
        truncated = booleans_of(batch.column(columns.truncated), columns.truncated, errors)
    if drop_truncated:
        assert truncated is not None, "the schema has the column"
        errors.ignore(truncated)
    tokens = read_tokens(batch, columns, errors)
    aligner = Aligner(batch=batch, lengths=tokens.lengths, errors=errors)
    response = response_mask(aligner, columns, tokens)
    mask, response_start = response.ones, response.starts
    if columns.attention_mask is not None:
        attention = aligner.attention_mask(columns.attention_mask)
        attended: NDArray[np.bool_] | None = attention
        mask = mask & attention
    else:
        attended = without_padding(tokens, mask, columns, errors)
    lengths = tokens.lengths if attended is None else counts_of(attended, tokens.lengths)
    _check_ids(tokens, attended, columns, limits, errors)
    _check_lengths(lengths, columns, limits, errors)
    _check_mask(mask, attended, tokens.lengths, columns, errors)

    def finite(name: str) -> NDArray[np.float32]:
        return _finite(aligner.numbers(name, response_start, mask), mask, tokens.lengths, name, errors)

    returns = np.zeros(len(mask), np.float32) if columns.returns is None else finite(columns.returns)
    values = None if columns.values is None else finite(columns.values)
    paid, carried = _rewards(aligner, columns, mask, attended, response_start, required=rewards == "yes")
    real = slice(None) if attended is None else attended
    return CheckedBatch(
        input_ids=tokens.ids[real].astype(np.int32, copy=False),
        lengths=lengths,
        response_mask=mask[real],
        returns=returns[real],
        values=None if values is None else values[real],
        rewards=None if paid is None else paid[real],
        truncated=truncated,
        errors=errors,
        notes=_notes(aligner, carried, cut=attended is not None and columns.attention_mask is None),
        narrowest=response.narrowest,
    )


def _notes(aligner: Aligner, carried: int, *, cut: bool) -> tuple[str, ...]:
    """What was done to columns that do not have an entry for every token, and to padding, in sentences."""
    notes = ["rewards stand on observation tokens: each is given to the response token before it, which earned it"]
    notes = notes if carried else []
    notes += [f"`{name}` is as long as the response: it is aligned to it" for name in sorted(aligner.response_aligned)]
    notes += [
        f"`{name}` has one entry for each turn of the policy: each is given to the last token of its turn"
        for name in sorted(aligner.turn_aligned)
    ]
    if cut:
        notes.append("there is no attention_mask: the runs of one token behind the responses are padding and are cut")
    return tuple(notes)


def _rewards(
    aligner: Aligner,
    columns: Columns,
    mask: NDArray[np.bool_],
    attended: NDArray[np.bool_] | None,
    response_start: NDArray[np.int64],
    *,
    required: bool,
) -> tuple[NDArray[np.float32] | None, int]:
    """Rewards over all tokens, and of how many rollouts some were carried back."""
    name = columns.rewards or columns.reward
    if name is None:
        return None, 0
    lengths, errors = aligner.lengths, aligner.errors if required else RowErrors(len(aligner.lengths))
    if columns.rewards is not None:
        reading = replace(aligner, errors=errors)
        spread = reading.numbers(name, response_start, turns=turn_ends(mask, lengths))
        assigned = carried_back(spread, mask, attended, lengths)
        rewards, carried = assigned.rewards, int((assigned.carried & ~errors.bad).sum())
    else:
        rewards, carried = on_last_token(numbers_of(aligner.batch.column(name), name, errors), mask, lengths), 0
    checked = _finite(rewards, mask, lengths, name, errors)
    if (errors.bad & ~aligner.errors.bad).any():
        return None, 0
    return checked, carried


def _check_ids(
    tokens: Tokens, attended: NDArray[np.bool_] | None, columns: Columns, limits: RowLimits, errors: RowErrors
) -> None:
    """Mark rows with ids that the model has no embedding for, or none of its own; padding may hold any id."""
    _check_placeholders(tokens, attended, columns, limits, errors)
    ids = tokens.ids
    end = INT32_END if limits.vocab_size is None else limits.vocab_size
    if not len(ids) or (ids.min() >= 0 and ids.max() < end):
        return
    expected = f"ids from 0 to {end - 1}" + ("" if limits.vocab_size is None else f" ({limits.vocab_size_of})")
    outside = (ids < 0) | (ids >= end)
    _mark_ids(outside, "token ids outside the vocabulary", expected, tokens, attended, columns, errors)


def _check_placeholders(
    tokens: Tokens, attended: NDArray[np.bool_] | None, columns: Columns, limits: RowLimits, errors: RowErrors
) -> None:
    """Mark rows in which features of an image, a video or a sound would stand: a critic reads token ids alone."""
    if limits.placeholder_ids and len(tokens.ids):
        placeholders = np.isin(tokens.ids, limits.placeholder_ids)
        expected = "text alone: a critic is not given what stands in the place of an image, a video or a sound"
        _mark_ids(placeholders, "placeholders of images, videos or sounds", expected, tokens, attended, columns, errors)


def _mark_ids(
    where: NDArray[np.bool_],
    problem: str,
    expected: str,
    tokens: Tokens,
    attended: NDArray[np.bool_] | None,
    columns: Columns,
    errors: RowErrors,
) -> None:
    """Mark the rows of some tokens under the name of the column that holds them; padding does not count."""
    if attended is not None:
        where = where & attended
    if not where.any():
        return
    first = offsets_from_lengths(tokens.lengths)[:-1] + first_of(where, tokens.lengths)

    def mark(tokens_at: NDArray[np.bool_], name: str | None) -> None:
        rows = rows_with(tokens_at, tokens.lengths)
        errors.mark(rows, name or "", problem, lambda row: f"token id {tokens.ids[first[row]]}", expected)

    if tokens.prompt_lengths is None:
        mark(where, columns.input_ids)
    else:
        positions = repeat_by_length(np.zeros_like(tokens.lengths), tokens.lengths)
        mark(where & (positions < np.repeat(tokens.prompt_lengths, tokens.lengths)), columns.prompts)
        mark(where, columns.responses)


def _check_lengths(lengths: NDArray[np.int64], columns: Columns, limits: RowLimits, errors: RowErrors) -> None:
    if columns.attention_mask is not None:
        errors.mark(lengths == 0, columns.attention_mask, "no tokens", lambda _: "padding only", "a 1 on every token")
    if limits.max_length is not None:
        errors.mark(
            lengths > limits.max_length,
            columns.input_ids or columns.responses or "",
            f"more tokens than {limits.max_length_of}",
            lambda row: f"{lengths[row]} tokens",
            f"at most {limits.max_length} ({limits.max_length_of})",
        )


def _check_mask(
    mask: NDArray[np.bool_],
    attended: NDArray[np.bool_] | None,
    lengths: NDArray[np.int64],
    columns: Columns,
    errors: RowErrors,
) -> None:
    name = columns.response_mask or columns.responses or ""
    first = first_of(mask, lengths)
    errors.mark(
        first == lengths, name, "nothing to train on", lambda _: "no response token", "a 1 on at least one token"
    )
    errors.mark(
        first == (0 if attended is None else first_of(attended, lengths)),
        name if columns.prompts is None else columns.prompts,
        "no prompt",
        lambda _: "a response token in first place",
        "at least one token before the response: its state carries the first value",
    )


def _finite(
    column: NDArray[Any], mask: NDArray[np.bool_], lengths: NDArray[np.int64], name: str, errors: RowErrors
) -> NDArray[np.float32]:
    """float32 [T], 0 off the mask. Marks rows with NaN, infinities and absurdly large numbers, on the mask."""
    wide = column.dtype == np.float64
    numbers = column if wide else column.astype(np.float32, copy=False)
    # Entries off the mask are never used, and many dumps pad with NaN.
    numbers = np.where(mask, numbers, numbers.dtype.type(0))
    # NaN compares false.
    sound = np.abs(numbers) <= LARGEST
    if not sound.all():
        odd = ~sound
        first = offsets_from_lengths(lengths)[:-1] + first_of(odd, lengths)
        endless = rows_with(odd & ~np.isfinite(numbers), lengths)

        def actual(row: int) -> str:
            return f"{column[first[row]]} on a response token"

        errors.mark(endless, name, "NaN or infinite numbers", actual, "a finite number")
        expected = f"at most {LARGEST:.3g}, of which float32 holds the square"
        errors.mark(rows_with(odd, lengths), name, "numbers too large", actual, expected)
        numbers[odd] = 0.0
    return numbers.astype(np.float32, copy=False)
