"""Rollouts in memory: ragged columns, concatenated. All stages after reading use this form."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """A batch of n rollouts with T tokens in all.

    Token columns are aligned to the token they pair with: `values[t]` is the value of the state in which
    token t is chosen, so it is read off the hidden state of token t-1 of the same rollout.

    Attributes:
        input_ids: int32 [T], prompt then response (multi-turn: observation tokens in between).
        offsets: int64 [n+1]; rollout i owns tokens offsets[i]:offsets[i+1].
        response_mask: bool [T], true on the tokens the policy chose. Never true on a rollout's first token.
        returns: float32 [T], the regression target G where response_mask is true; 0 until they are computed from
            rewards.
        values: float32 [T], V_old, the values stored at rollout time; None where the shards have none.
        group: int64 [n], key of the prompt group: equal keys, same prompt.
        row: int64 [n], position of the rollout in the data set as read (file order).
        rewards: float32 [T], the reward of each token, 0 off the mask; None where they were not read. One reward a
            rollout is on its last response token.
        truncated: bool [n], whether generation was cut off before it ended by itself; None where it was not read.
        labels: per-rollout columns for slicing, name -> array [n] of str, int, float or bool.
    """

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    response_mask: NDArray[np.bool_]
    returns: NDArray[np.float32]
    values: NDArray[np.float32] | None
    group: NDArray[np.int64]
    row: NDArray[np.int64]
    rewards: NDArray[np.float32] | None = None
    truncated: NDArray[np.bool_] | None = None
    labels: dict[str, NDArray[np.generic]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 [n], tokens of each rollout."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def response_counts(self) -> NDArray[np.int64]:
        """int64 [n], tokens of each rollout on which the mask is true."""
        return np.diff(np.searchsorted(np.flatnonzero(self.response_mask), self.offsets))

    def take(self, index: NDArray[np.int64]) -> "Rollouts":
        """The rollouts at the given positions, in the order given.

        Args:
            index: int64 [m], positions in 0..n-1; repeats are allowed.
        """
        tokens, offsets = ragged_take(self.offsets, index)
        return replace(
            self,
            input_ids=self.input_ids[tokens],
            offsets=offsets,
            response_mask=self.response_mask[tokens],
            returns=self.returns[tokens],
            values=None if self.values is None else self.values[tokens],
            group=self.group[index],
            row=self.row[index],
            rewards=None if self.rewards is None else self.rewards[tokens],
            truncated=None if self.truncated is None else self.truncated[index],
            labels={name: column[index] for name, column in self.labels.items()},
        )


def concat_rollouts(parts: Sequence[Rollouts]) -> Rollouts:
    """Concatenate rollouts; at least one part. Columns that any part lacks are None in the result."""
    if len(parts) == 1:
        return parts[0]

    def column(name: str) -> Any:
        columns = [getattr(part, name) for part in parts]
        return None if any(part is None for part in columns) else np.concatenate(columns)

    per_token = ("input_ids", "response_mask", "returns", "values", "rewards")
    per_rollout = ("group", "row", "truncated")
    return Rollouts(
        offsets=offsets_from_lengths(np.concatenate([part.lengths for part in parts])),
        labels={name: np.concatenate([part.labels[name] for part in parts]) for name in parts[0].labels},
        **{name: column(name) for name in per_token + per_rollout},
    )


def ragged_take(offsets: NDArray[np.int64], index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the elements of the chosen rows of a ragged column, and the chosen rows' own offsets.

    Args:
        offsets: int64 [n+1] of the ragged column.
        index: int64 [m], the rows wanted, in order.

    Returns:
        (elements int64 [sum of the chosen lengths], offsets int64 [m+1]).
    """
    lengths = offsets[index + 1] - offsets[index]
    return repeat_by_length(offsets[index], lengths), offsets_from_lengths(lengths)


def repeat_by_length(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [sum of lengths]: starts[i], starts[i]+1, ... `lengths[i]` numbers of each, row after row."""
    offsets = offsets_from_lengths(lengths)
    return np.arange(offsets[-1], dtype=np.int64) + np.repeat(starts - offsets[:-1], lengths)


def offsets_from_lengths(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [n] -> int64 [n+1]."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def rollouts_of_tokens(sequences: Sequence[ArrayLike], prompt_lengths: Sequence[int]) -> Rollouts:
    """Rollouts of which nothing is known but their tokens: all after the prompt are response tokens, returns are 0.

    Args:
        sequences: the token ids of each, [tokens].
        prompt_lengths: tokens of each that are prompt.
    """
    arrays = [np.asarray(ids) for ids in sequences]
    offsets = offsets_from_lengths(np.asarray([len(ids) for ids in arrays], dtype=np.int64))
    mask = np.ones(offsets[-1], dtype=np.bool_)
    for start, prompt in zip(offsets[:-1].tolist(), prompt_lengths, strict=True):
        mask[start : start + prompt] = False
    return Rollouts(
        input_ids=np.concatenate([*arrays, np.zeros(0, dtype=np.int32)]).astype(np.int32),
        offsets=offsets,
        response_mask=mask,
        returns=np.zeros(offsets[-1], dtype=np.float32),
        values=None,
        group=np.zeros(len(arrays), dtype=np.int64),
        row=np.arange(len(arrays), dtype=np.int64),
    )
