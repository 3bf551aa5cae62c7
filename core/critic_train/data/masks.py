"""Which tokens the policy chose, where a shard says it in one mask or in several, and where it pads without a mask."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from critic_train.data.alignment import LABELS, LENGTHS, Aligner, Tokens, counts_of, first_of
from critic_train.data.bad_input import RowErrors
from critic_train.data.schema import Columns
from critic_train.errors import DataError
from critic_train.rollouts import offsets_from_lengths, repeat_by_length

SHORTEST_PADDING, NARROWEST_COLUMN = 2, 8
"""Equal tokens at an end that may be padding (one alone may be the token that ends every response), and the width of
columns that are looked at: nobody pads to less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseMask:
    """Where the policy wrote, over the tokens of a batch.

    Attributes:
        ones: bool [T].
        starts: int64 [n], the index in each row where its response starts.
        narrowest: of several masks, those that the others do not narrow further in any row.
    """

    ones: NDArray[np.bool_]
    starts: NDArray[np.int64]
    narrowest: frozenset[str]


@dataclass(slots=True, kw_only=True)
class MaskChoice:
    """Which of a file's masks is the narrowest, batch by batch.

    Args:
        file: for messages.
        masks: the file's masks.
    """

    file: str
    masks: tuple[str, ...]
    _left: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self._left = frozenset(self.masks)

    def add(self, narrowest: frozenset[str]) -> None:
        """Take in a batch.

        Raises:
            DataError: no mask lies within the others in all batches, so that it is unclear what the policy wrote.
        """
        self._left &= narrowest
        if len(self.masks) > 1 and not self._left:
            raise DataError(
                f"{self.file}: {' and '.join(f'`{name}`' for name in self.masks)} mark different tokens, and neither "
                "lies within the other",
                hint=f"say which marks the tokens that the policy chose: --column response_mask={self.masks[0]}",
            )

    @property
    def chosen(self) -> str | None:
        """The narrowest so far; None without a mask."""
        return next((name for name in self.masks if name in self._left), None)

    def sentences(self) -> list[str]:
        """A notice on the choice; none where there is one mask."""
        if len(self.masks) < 2:
            return []
        chosen = self.chosen
        others = " and ".join(f"`{name}`" for name in self.masks if name != chosen)
        how = "marks the same tokens as" if len(self._left) == len(self.masks) else "is narrower than"
        return [f"`{chosen}` is read as response_mask: it {how} {others}"]


def response_mask(aligner: Aligner, columns: Columns, tokens: Tokens) -> ResponseMask:
    """The mask of a batch: where all of its masks have a 1, and never on a prompt that stands in a column of its own.

    Multi-turn dumps have a mask of everything behind the prompt beside one without the observations (verl 0.4's
    `response_mask` and `loss_mask`, Search-R1's `info_mask`, which has ones on the prompt). Where masks lie in one
    another, the narrowest is the policy's part; a mask that fits no row is left out.
    """
    prompts = tokens.prompt_lengths
    base = None
    if prompts is not None:
        base = repeat_by_length(np.zeros_like(aligner.lengths), aligner.lengths) >= np.repeat(prompts, aligner.lengths)
    if not columns.masks:
        assert base is not None, "without a mask the schema has prompts and responses"
        assert prompts is not None
        return ResponseMask(ones=base, starts=prompts, narrowest=frozenset())
    masks, starts = _aligned_masks(aligner, columns, tokens)
    ones = np.logical_and.reduce([*masks.values(), *([] if base is None else [base])])
    if prompts is None:
        prompts = np.where(starts >= 0, starts, first_of(ones, aligner.lengths))
    within = {name: mask if base is None else mask & base for name, mask in masks.items()}
    good = ~np.repeat(aligner.errors.bad, aligner.lengths)
    narrowest = frozenset(name for name, mask in within.items() if not ((mask != ones) & good).any())
    return ResponseMask(ones=ones, starts=prompts, narrowest=narrowest)


def _aligned_masks(
    aligner: Aligner, columns: Columns, tokens: Tokens
) -> tuple[dict[str, NDArray[np.bool_]], NDArray[np.int64]]:
    """Every mask over all tokens, and where a mask of the response alone starts; -1 where none is."""
    masks: dict[str, NDArray[np.bool_]] = {}
    starts = np.full(len(aligner.lengths), -1, dtype=np.int64)
    fits_nowhere: RowErrors | None = None
    for name in columns.masks:
        trial = aligner.with_errors(RowErrors(len(aligner.lengths)))
        mask, start = trial.mask(name, tokens)
        lengths_disagree = [reason == LENGTHS for reason, *_ in trial.errors.by_row.values()]
        if len(columns.masks) > 1 and len(lengths_disagree) == len(aligner.lengths) and all(lengths_disagree):
            fits_nowhere = fits_nowhere or trial.errors
            continue
        if name == LABELS and len(columns.masks) > 1 and trial.errors.bad.any():
            continue  # labels of something else
        aligner.errors.take(trial.errors)
        masks[name] = mask
        starts = np.maximum(starts, start)
    if not masks and fits_nowhere is not None:
        aligner.errors.take(fits_nowhere)
        masks[columns.masks[0]] = np.zeros(int(aligner.lengths.sum()), dtype=np.bool_)
    return masks, starts


def turn_ends(mask: NDArray[np.bool_], lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The last token of each run of ones.

    Returns:
        (int64 positions, end to end; int64 [n] how many each row has).
    """
    offsets = offsets_from_lengths(lengths)
    following = np.append(mask[1:], False)
    following[offsets[1:][lengths > 0] - 1] = False
    ends = mask & ~following
    return np.flatnonzero(ends), counts_of(ends, lengths)


def without_padding(
    tokens: Tokens, mask: NDArray[np.bool_], columns: Columns, errors: RowErrors
) -> NDArray[np.bool_] | None:
    """Find padding in a batch that has no attention mask.

    Rows are padded where a column has one width and most rows end, or begin, in runs of one token, of different
    lengths. Behind the last token of the policy it does no harm and is cut. Elsewhere it would be context, or be
    trained on: such rows are marked.

    Returns:
        bool [T], false on what is cut; None where nothing is.
    """
    offsets = offsets_from_lengths(tokens.lengths)
    if tokens.prompt_lengths is None:
        parts = [(columns.input_ids or "", offsets[:-1], offsets[1:])]
    else:
        middle = offsets[:-1] + tokens.prompt_lengths
        parts = [(columns.prompts or "", offsets[:-1], middle), (columns.responses or "", middle, offsets[1:])]
    attended = None
    for name, starts, stops in parts:
        if len(starts) < 2 or (stops - starts != stops[0] - starts[0]).any() or stops[0] - starts[0] < NARROWEST_COLUMN:
            continue
        matrix = tokens.ids[repeat_by_length(starts, stops - starts)].reshape(len(starts), -1)
        for end, view in (("begins", matrix), ("ends", matrix[:, ::-1])):
            runs, token = _runs(view)
            if token is None:
                continue
            padded = runs > 0
            last = np.asarray([np.flatnonzero(mask[a:b])[-1:].sum() for a, b in zip(starts, stops, strict=True)])
            if end == "ends" and columns.masks and (last[padded] < (stops - starts - runs)[padded]).all():
                attended = np.ones(len(tokens.ids), dtype=np.bool_) if attended is None else attended
                attended[repeat_by_length(stops - runs, runs)] = False
            else:
                where = "the start" if end == "begins" else "the end"
                errors.mark(padded, name, "padding", _run(runs, token, where), "an attention_mask, 0 on padding")
    return attended


def _run(runs: NDArray[np.int64], token: int, where: str) -> Callable[[int], str]:
    return lambda row: f"{runs[row]} times token {token} at {where}, as in most rows"


def _runs(matrix: NDArray[np.int64]) -> tuple[NDArray[np.int64], int | None]:
    """Of a matrix [n, width]: the length [n] of the run of the padding token that a row begins with, and that token."""
    differs = matrix != matrix[:, :1]
    runs = np.where(differs.any(axis=1), differs.argmax(axis=1), matrix.shape[1])
    long = runs >= SHORTEST_PADDING
    if 2 * long.sum() < len(matrix):
        return runs, None
    tokens, counts = np.unique(matrix[long, 0], return_counts=True)
    token = int(tokens[counts.argmax()])
    runs = np.where(matrix[:, 0] == token, runs, 0)
    # Rows of one length that all begin alike, as with a template, have runs of one length too.
    is_padding = 2 * (runs >= SHORTEST_PADDING).sum() >= len(matrix) and len(np.unique(runs)) > 1
    return runs, token if is_padding else None
