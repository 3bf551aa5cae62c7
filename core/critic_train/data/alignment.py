"""Arrow's list columns as flat numpy arrays, aligned to the tokens they pair with.

A column may be as long as the rollout or as its response; rewards that stand on observation tokens are carried back to
the response token that earned them.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from critic_train.data.bad_input import RowErrors
from critic_train.data.schema import Columns
from critic_train.rollouts import offsets_from_lengths, repeat_by_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Ragged:
    """A list column of n rows with T elements in all.

    Attributes:
        flat: [T], the elements end to end; 0 where they are null. May be a read-only view of Arrow memory.
        lengths: int64 [n]; 0 for a null row.
        null_rows: bool [n], the row is null or one of its elements is.
        null_lists: bool [n], the row is null.
        null_items: bool [T], the element is null; None where none is.
    """

    flat: NDArray[Any]
    lengths: NDArray[np.int64]
    null_rows: NDArray[np.bool_]
    null_lists: NDArray[np.bool_]
    null_items: NDArray[np.bool_] | None = None

    @property
    def offsets(self) -> NDArray[np.int64]:
        """int64 [n+1], first element of each row."""
        return offsets_from_lengths(self.lengths)


def ragged(column: pa.Array) -> Ragged:
    """Any kind of Arrow list (list, large_list, fixed_size_list, list views; sliced or not) as a Ragged."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    null_rows = null_lists = column.is_null().to_numpy(zero_copy_only=False)
    items = column.flatten()
    null_items = None
    if items.null_count:
        null_items = items.is_null().to_numpy(zero_copy_only=False)
        null_rows = null_lists | rows_with(null_items, lengths)
        items = pc.fill_null(items, pa.scalar(0).cast(items.type))
    flat = items.to_numpy(zero_copy_only=False)
    return Ragged(flat=flat, lengths=lengths, null_rows=null_rows, null_lists=null_lists, null_items=null_items)


def side_by_side(left: Ragged, right: Ragged) -> Ragged:
    """Every row of `left` followed by the same row of `right`; both hold integers."""
    kind = np.result_type(left.flat, right.flat)
    if kind.kind == "f":  # numpy's answer to uint64 beside a signed type; it would round large ids
        left, right, kind = _signed(left), _signed(right), np.dtype(np.int64)
    lengths = left.lengths + right.lengths
    starts = offsets_from_lengths(lengths)[:-1]
    flat = np.empty(int(lengths.sum()), dtype=kind)
    flat[repeat_by_length(starts, left.lengths)] = left.flat
    flat[repeat_by_length(starts + left.lengths, right.lengths)] = right.flat
    return Ragged(
        flat=flat,
        lengths=lengths,
        null_rows=left.null_rows | right.null_rows,
        null_lists=left.null_lists | right.null_lists,
    )


def rows_with(flags: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [n]: whether any element of the row is flagged."""
    return counts_of(flags, lengths) > 0


def counts_of(flags: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [n]: flagged elements of each row."""
    offsets = offsets_from_lengths(lengths)
    at = np.flatnonzero(flags)
    return np.diff(np.searchsorted(at, offsets))


def first_of(flags: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [n]: index of the first flagged element in each row; the row's length where there is none."""
    offsets = offsets_from_lengths(lengths)
    at = np.flatnonzero(flags)
    if not len(at):
        return lengths.copy()
    after = np.searchsorted(at, offsets[:-1])
    first = np.where(after < len(at), at[np.minimum(after, len(at) - 1)], offsets[-1])
    return np.asarray(np.minimum(first, offsets[1:]) - offsets[:-1], dtype=np.int64)


def _signed(column: Ragged) -> Ragged:
    """As int64; what lies beyond stays beyond any vocabulary."""
    flat = np.minimum(column.flat, np.iinfo(np.int64).max).astype(np.int64)
    return replace(column, flat=flat)


LABELS, IGNORED = "labels", -100
"""Where language models are trained, and the label there of a token that no loss is taken on."""
LENGTHS = "lengths that disagree"
NULLS = "nulls"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The token ids of n rows, T in all, padding included where the shard has it.

    Attributes:
        ids: integers [T].
        lengths: int64 [n].
        prompt_lengths: int64 [n] where the shard has prompts and responses apart; else None.
    """

    ids: NDArray[Any]
    lengths: NDArray[np.int64]
    prompt_lengths: NDArray[np.int64] | None


def read_tokens(batch: pa.RecordBatch, columns: Columns, errors: RowErrors) -> Tokens:
    """The ids of every row. Marks null and empty rows.

    Args:
        batch: raw rows.
        columns: which column is which; `input_ids`, or `prompts` and `responses`.
        errors: of the batch, in which rows are marked.
    """
    if columns.input_ids is not None:
        ids = _read_ids(batch, columns.input_ids, errors)
        prompts = None
        errors.mark(ids.lengths == 0, columns.input_ids, "no tokens", _empty, "at least two token ids")
    else:
        left = _read_ids(batch, columns.prompts or "", errors)
        right = _read_ids(batch, columns.responses or "", errors)
        errors.mark(right.lengths == 0, columns.responses or "", "no tokens", _empty, "at least one token id")
        ids, prompts = side_by_side(left, right), left.lengths
    return Tokens(ids=ids.flat, lengths=ids.lengths, prompt_lengths=prompts)


@dataclass(slots=True, kw_only=True)
class Aligner:
    """Reads columns of a batch and spreads them over its tokens.

    Attributes:
        batch: raw rows.
        lengths: int64 [n], tokens of each row.
        errors: of the batch; rows whose columns fit nowhere are marked.
        response_aligned: columns that were as long as the response.
        turn_aligned: columns that had one entry a turn of the policy's.
    """

    batch: pa.RecordBatch
    lengths: NDArray[np.int64]
    errors: RowErrors
    response_aligned: set[str] = field(default_factory=set)
    turn_aligned: set[str] = field(default_factory=set)

    def with_errors(self, errors: RowErrors) -> "Aligner":
        """The same columns, marking bad rows elsewhere."""
        return replace(self, errors=errors)

    def mask(self, name: str, tokens: Tokens) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """One mask over all tokens, and where a mask of the response alone starts.

        Labels, which repeat the token ids and have IGNORED in place of those that no loss is taken on, are a mask too.

        Args:
            name: the mask's column.
            tokens: of the batch.

        Returns:
            (bool [T]; int64 [n], -1 in rows where the mask is as long as the rollout).
        """
        column = self._read(name)
        full = column.lengths == self.lengths
        if tokens.prompt_lengths is None:
            short = (column.lengths > 0) & (column.lengths < self.lengths)
        else:
            short = ~full & (column.lengths == self.lengths - tokens.prompt_lengths)
        if _are_labels(name, column):
            mask = self._label_targets(name, column, tokens.ids, full, short)
        else:
            mask = self._ones(self._align(name, column, full, short), name)
        return mask, np.where(short, self.lengths - column.lengths, -1)

    def _label_targets(
        self, name: str, column: Ragged, ids: NDArray[Any], full: NDArray[np.bool_], short: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Where labels are token ids. Labels that were shifted by one beforehand are shifted back."""
        labels = self._align(name, column, full, short)
        targets: NDArray[np.bool_] = self._align(name, replace(column, flat=column.flat != IGNORED), full, short)
        targets = targets if targets.dtype == np.bool_ else targets != 0
        differing = targets & (labels != ids)
        if not differing.any():
            return targets
        following = np.append(ids[1:], ids[:1])
        last = np.zeros(len(ids), dtype=np.bool_)
        last[offsets_from_lengths(self.lengths)[1:][self.lengths > 0] - 1] = True
        # The label behind a rollout's last token stands for nothing.
        if not (targets & ~last & (labels != following)).any():
            return np.append(False, (targets & ~last)[:-1])
        rows = rows_with(differing, self.lengths)
        self.errors.mark(rows, name, "labels of other tokens", lambda _: "a label", f"the token's id, or {IGNORED}")
        return targets

    def attention_mask(self, name: str) -> NDArray[np.bool_]:
        """bool [T], false on padding. It covers prompt and response; one of the response alone says too little."""
        column = self._read(name)
        full = column.lengths == self.lengths
        return self._ones(self._align(name, column, full, np.zeros_like(full)), name)

    def numbers(
        self,
        name: str,
        response_start: NDArray[np.int64],
        mask: NDArray[np.bool_] | None = None,
        turns: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
    ) -> NDArray[Any]:
        """[T], a column as long as the rollout or its response; 0 where it has no entry.

        Args:
            name: the column.
            response_start: int64 [n], the index where each row's response starts.
            mask: bool [T], outside of which nulls are ignored, as NaN is; None where none are allowed.
            turns: (positions [m], how many each row has [n]) where a column with one entry a turn stands; None where
                there is no such column.
        """
        column = self._read(name, null_items=mask is not None)
        full = column.lengths == self.lengths
        short = ~full & (column.lengths == self.lengths - response_start)
        if turns is not None and not (full | short).any() and (column.lengths == turns[1]).all():
            spread = np.zeros(int(self.lengths.sum()), dtype=column.flat.dtype)
            spread[turns[0]] = column.flat
            self.turn_aligned.add(name)
            return spread
        numbers = self._align(name, column, full, short)
        if mask is not None and column.null_items is not None:
            nulls = self._align(name, replace(column, flat=column.null_items), full, short)
            self._mark_nulls(rows_with(nulls & mask, self.lengths), name)
        return numbers

    def _read(self, name: str, *, null_items: bool = False) -> Ragged:
        """A column; marks null rows, and those with null elements unless they are allowed here."""
        column = ragged(self.batch.column(name))
        self._mark_nulls(column.null_lists if null_items else column.null_rows, name)
        return column

    def _mark_nulls(self, rows: NDArray[np.bool_], name: str) -> None:
        self.errors.mark(rows, name, NULLS, lambda _: "null", "a number for every token")

    def _align(self, name: str, column: Ragged, full: NDArray[np.bool_], short: NDArray[np.bool_]) -> NDArray[Any]:
        """A column over all tokens: from the first one where `full`, up to the last one where `short`."""
        fits = full | short
        if full.all():
            return column.flat
        expected = "as many as the rollout or its response has tokens"
        self.errors.mark(~fits, name, LENGTHS, lambda row: self._lengths_of(column, row), expected)
        if (short & ~self.errors.bad).any():
            self.response_aligned.add(name)
        aligned = np.zeros(int(self.lengths.sum()), dtype=column.flat.dtype)
        # Both kinds end with the rollout.
        starts = offsets_from_lengths(self.lengths)[1:] - column.lengths
        if fits.all():
            aligned[repeat_by_length(starts, column.lengths)] = column.flat
        else:
            lengths = np.where(fits, column.lengths, 0)
            aligned[repeat_by_length(starts, lengths)] = column.flat[repeat_by_length(column.offsets[:-1], lengths)]
        return aligned

    def _lengths_of(self, column: Ragged, row: int) -> str:
        return f"{column.lengths[row]} elements beside {self.lengths[row]} tokens"

    def _ones(self, flat: NDArray[Any], name: str) -> NDArray[np.bool_]:
        """A mask as booleans. Marks rows with anything but 0 and 1."""
        if flat.dtype == np.bool_:
            return flat
        mask: NDArray[np.bool_] = flat == 1
        odd = ~mask & (flat != 0)
        if odd.any():
            offsets = offsets_from_lengths(self.lengths)
            rows = rows_with(odd, self.lengths)
            first = offsets[:-1] + first_of(odd, self.lengths)
            self.errors.mark(rows, name, "mask entries other than 0 and 1", lambda row: f"{flat[first[row]]}", "0 or 1")
        return mask


def _are_labels(name: str, column: Ragged) -> bool:
    """Whether a mask's column holds labels: no row of zeros and ones alone, and some token ignored."""
    if column.flat.dtype.kind not in "iu" or not (name == LABELS or (column.flat == IGNORED).any()):
        return False
    plain = ~rows_with((column.flat != 0) & (column.flat != 1), column.lengths) & (column.lengths > 0)
    return not plain.any()


def _read_ids(batch: pa.RecordBatch, name: str, errors: RowErrors) -> Ragged:
    ids = ragged(batch.column(name))
    errors.mark(ids.null_rows, name, NULLS, lambda _: "null", "a token id for every token")
    return ids


def _empty(_: int) -> str:
    return "an empty list"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRewards:
    """Rewards over the tokens of a batch.

    Attributes:
        rewards: float64 [T]; off the mask anything.
        carried: bool [n], rollouts with a reward on an observation token, which was carried back.
    """

    rewards: NDArray[np.float64]
    carried: NDArray[np.bool_]


def carried_back(
    rewards: NDArray[Any], mask: NDArray[np.bool_], attended: NDArray[np.bool_] | None, lengths: NDArray[np.int64]
) -> TokenRewards:
    """Rewards with those on observation tokens moved to the response token before them.

    Environments often write the reward of an action under their answer, or under a last token that is masked out. The
    returns are computed over masked tokens alone, so such a reward would be lost. Rewards on the prompt or on padding,
    and NaN off the mask, are ignored.

    Args:
        rewards: numbers [T].
        mask: bool [T].
        attended: bool [T], false on padding; None where there is none.
        lengths: int64 [n].
    """
    numbers = rewards.astype(np.float64)
    stray = ~mask & (numbers != 0) & np.isfinite(numbers)
    if attended is not None:
        stray &= attended
    if not stray.any():
        return TokenRewards(rewards=numbers, carried=np.zeros(len(lengths), dtype=np.bool_))
    before = np.maximum.accumulate(np.where(mask, np.arange(len(mask)), -1))
    starts = np.repeat(offsets_from_lengths(lengths)[:-1], lengths)
    stray &= before >= starts
    np.add.at(numbers, before[stray], numbers[stray])
    return TokenRewards(rewards=numbers, carried=rows_with(stray, lengths))


def on_last_token(rewards: NDArray[np.float64], mask: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[Any]:
    """Put each rollout's one reward on its last response token.

    Args:
        rewards: float64 [n].
        mask: bool [T].
        lengths: int64 [n].

    Returns:
        float64 [T].
    """
    at = np.flatnonzero(mask)
    bounds = np.searchsorted(at, offsets_from_lengths(lengths))
    some = bounds[1:] > bounds[:-1]
    aligned = np.zeros(len(mask))
    aligned[at[bounds[1:][some] - 1]] = rewards[some]
    return aligned


def numbers_of(column: pa.Array, name: str, errors: RowErrors) -> NDArray[np.float64]:
    """float64 [n], one number a rollout. Marks nulls."""
    nulls = column.is_null().to_numpy(zero_copy_only=False)
    errors.mark(nulls, name, NULLS, lambda _: "null", "a number")
    plain = pc.cast(column, pa.int8()) if pa.types.is_boolean(column.type) else column
    filled = pc.fill_null(plain, pa.scalar(0).cast(plain.type)).to_numpy(zero_copy_only=False)
    return np.asarray(filled, dtype=np.float64)


def booleans_of(column: pa.Array, name: str, errors: RowErrors) -> NDArray[np.bool_]:
    """bool [n], one boolean a rollout. Marks nulls and anything but 0 and 1."""
    numbers = numbers_of(column, name, errors)
    odd = (numbers != 0) & (numbers != 1)
    errors.mark(odd, name, "truth values other than 0 and 1", lambda row: f"{numbers[row]:g}", "true or false")
    return np.equal(numbers, 1.0)
