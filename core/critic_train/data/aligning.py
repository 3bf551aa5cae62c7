"""Put a shard's columns under the tokens they pair with."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from critic_train.data.columns import Columns
from critic_train.data.faults import Faults
from critic_train.data.ragged import Ragged, first_of, ragged, rows_with, side_by_side
from critic_train.rollouts import offsets_of, spread

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


def read_tokens(batch: pa.RecordBatch, columns: Columns, faults: Faults) -> Tokens:
    """The ids of every row. Marks null and empty rows."""
    if columns.input_ids is not None:
        ids = _read_ids(batch, columns.input_ids, faults)
        prompts = None
        faults.mark(ids.lengths == 0, columns.input_ids, "no tokens", _empty, "at least two token ids")
    else:
        left = _read_ids(batch, columns.prompts or "", faults)
        right = _read_ids(batch, columns.responses or "", faults)
        faults.mark(right.lengths == 0, columns.responses or "", "no tokens", _empty, "at least one token id")
        ids, prompts = side_by_side(left, right), left.lengths
    return Tokens(ids=ids.flat, lengths=ids.lengths, prompt_lengths=prompts)


@dataclass(slots=True, kw_only=True)
class Aligner:
    """Reads columns of a batch and spreads them over its tokens.

    Attributes:
        batch: raw rows.
        lengths: int64 [n], tokens of each row.
        faults: of the batch; rows whose columns fit nowhere are marked.
        response_aligned: columns that were found to be as long as the response.
    """

    batch: pa.RecordBatch
    lengths: NDArray[np.int64]
    faults: Faults
    response_aligned: set[str] = field(default_factory=set)

    def response_mask(
        self, name: str | None, prompt_lengths: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """The mask over all tokens, and the place in each row where its response starts.

        Where the prompt's length is not known, a mask shorter than the rollout is a mask of the response, and
        says so how long that is; under a full mask the response starts at the first 1.

        Args:
            name: the mask's column; None (with prompts and responses only) where all of the response counts.
            prompt_lengths: int64 [n], where the shard says it.
        """
        if name is None:
            assert prompt_lengths is not None, "without a mask the schema has prompts and responses"
            places = spread(np.zeros_like(self.lengths), self.lengths)
            return places >= np.repeat(prompt_lengths, self.lengths), prompt_lengths
        column = self._read(name)
        full = column.lengths == self.lengths
        if prompt_lengths is None:
            short = (column.lengths > 0) & (column.lengths < self.lengths)
        else:
            short = ~full & (column.lengths == self.lengths - prompt_lengths)
        mask = self._ones(self._spread(name, column, full, short), name)
        if prompt_lengths is not None:
            return mask, prompt_lengths
        return mask, np.where(short, self.lengths - column.lengths, first_of(mask, self.lengths))

    def attention_mask(self, name: str) -> NDArray[np.bool_]:
        """bool [T], false on padding. It covers prompt and response; one of the response alone says too little."""
        column = self._read(name)
        full = column.lengths == self.lengths
        return self._ones(self._spread(name, column, full, np.zeros_like(full)), name)

    def numbers(
        self, name: str, response_start: NDArray[np.int64], mask: NDArray[np.bool_] | None = None
    ) -> NDArray[Any]:
        """[T], a column as long as the rollout or its response; 0 where it says nothing.

        Args:
            name: the column.
            response_start: int64 [n], the place where each row's response starts.
            mask: bool [T], outside of which nulls are passed over, as NaN is; None where none are allowed.
        """
        column = self._read(name, null_items=mask is not None)
        full = column.lengths == self.lengths
        short = ~full & (column.lengths == self.lengths - response_start)
        numbers = self._spread(name, column, full, short)
        if mask is not None and column.null_items is not None:
            nulls = self._spread(name, replace(column, flat=column.null_items), full, short)
            self._mark_nulls(rows_with(nulls & mask, self.lengths), name)
        return numbers

    def _read(self, name: str, *, null_items: bool = False) -> Ragged:
        """A column; marks null rows, and those with null elements unless they are allowed here."""
        column = ragged(self.batch.column(name))
        self._mark_nulls(column.null_lists if null_items else column.null_rows, name)
        return column

    def _mark_nulls(self, rows: NDArray[np.bool_], name: str) -> None:
        self.faults.mark(rows, name, NULLS, lambda _: "null", "a number for every token")

    def _spread(self, name: str, column: Ragged, full: NDArray[np.bool_], short: NDArray[np.bool_]) -> NDArray[Any]:
        """A column over all tokens: from the first one where `full`, up to the last one where `short`."""
        fits = full | short
        if full.all():
            return column.flat
        expected = "as many as the rollout or its response has tokens"
        self.faults.mark(~fits, name, LENGTHS, lambda row: self._lengths_of(column, row), expected)
        if (short & ~self.faults.bad).any():
            self.response_aligned.add(name)
        placed = np.zeros(int(self.lengths.sum()), dtype=column.flat.dtype)
        # Both kinds end with the rollout.
        starts = offsets_of(self.lengths)[1:] - column.lengths
        if fits.all():
            placed[spread(starts, column.lengths)] = column.flat
        else:
            lengths = np.where(fits, column.lengths, 0)
            placed[spread(starts, lengths)] = column.flat[spread(column.offsets[:-1], lengths)]
        return placed

    def _lengths_of(self, column: Ragged, row: int) -> str:
        return f"{column.lengths[row]} elements beside {self.lengths[row]} tokens"

    def _ones(self, flat: NDArray[Any], name: str) -> NDArray[np.bool_]:
        """A mask as booleans. Marks rows with anything but 0 and 1."""
        if flat.dtype == np.bool_:
            return flat
        mask: NDArray[np.bool_] = flat == 1
        odd = ~mask & (flat != 0)
        if odd.any():
            offsets = offsets_of(self.lengths)
            rows = rows_with(odd, self.lengths)
            first = offsets[:-1] + first_of(odd, self.lengths)
            self.faults.mark(rows, name, "mask entries other than 0 and 1", lambda row: f"{flat[first[row]]}", "0 or 1")
        return mask


def _read_ids(batch: pa.RecordBatch, name: str, faults: Faults) -> Ragged:
    ids = ragged(batch.column(name))
    faults.mark(ids.null_rows, name, NULLS, lambda _: "null", "a token id for every token")
    return ids


def _empty(_: int) -> str:
    return "an empty list"
