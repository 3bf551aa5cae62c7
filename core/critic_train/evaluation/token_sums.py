"""Sums over tokens, per rollout, per response position and over all, for each prediction; and the table of rollouts.

A prediction is anything that names a value for every response token: a critic, the stored values, a
baseline. The error is E = V - G, the value less the return.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from critic_train.evaluation.moments import (
    CoMoments,
    Floats,
    Integers,
    Moments,
    TokenColumn,
    join,
    pool,
    segment_moments,
)


@dataclass(frozen=True, slots=True)
class Cells:
    """The response tokens of m rollouts laid end to end, cut into (rollout, response position) cells.

    Attributes:
        rollouts: m.
        positions: number of equal parts of a response; token k of a response of n is in part k * positions // n.
        rollout: int64 [c], the rollout of each cell, rising.
        position: int64 [c], the part of the response, in 0..positions-1.
        starts: int64 [c], first token of each cell.
        counts: int64 [c], tokens of each cell, at least 1.
        owner: int64 [T], the cell of each token.
    """

    rollouts: int
    positions: int
    rollout: Integers
    position: Integers
    starts: Integers
    counts: Integers
    owner: Integers

    @classmethod
    def of(cls, lengths: Integers, positions: int) -> "Cells":
        """Cut responses of the given lengths.

        Args:
            lengths: int64 [m], response tokens of each rollout, each at least 1.
            positions: parts of a response.
        """
        # Part b begins at the first k with k * positions >= b * n, so that k * positions // n == b.
        edges = -(-(np.arange(positions + 1, dtype=np.int64) * lengths[:, None]) // positions)
        counts = np.diff(edges, axis=1)
        rollout, position = np.nonzero(counts)
        counts = counts[rollout, position]
        starts = np.cumsum(counts) - counts
        owner = np.repeat(np.arange(len(counts)), counts)
        return cls(len(lengths), positions, rollout, position, starts, counts, owner)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some whole rollouts and one prediction's values of them.

    Attributes:
        rollouts: which of all rollouts, in order of arrival.
        owner: int64 [T], the rollout of each response token, counted within the block.
        starts: int64 [rollouts], the first token of each.
        lengths: int64 [rollouts], their response tokens, at least 1 each.
        values: float32 [T].
        returns: float32 [T].
        rewards: float32 [T]; None where not every batch had them.
    """

    rollouts: slice
    owner: Integers
    starts: Integers
    lengths: Integers
    values: TokenColumn
    returns: TokenColumn
    rewards: TokenColumn | None


@dataclass(slots=True)
class ClipSums:
    """Sums over tokens of PPO's clipped value loss (Schulman et al. 2017's code; verl's compute_value_loss)."""

    loss: float = 0.0
    clipped: int = 0
    saturated: int = 0

    def add(self, v: Floats, g: Floats, old: Floats, cliprange: float) -> None:
        """Take in tokens: values, returns and old values, float64 [T] each."""
        plain = np.square(v - g)
        clipped = np.clip(v, old - cliprange, old + cliprange)
        np.subtract(clipped, g, out=clipped)
        np.multiply(clipped, clipped, out=clipped)
        larger = clipped > plain
        self.clipped += int(np.count_nonzero(larger))
        self.saturated += int(np.count_nonzero(larger & (np.abs(v - old) > cliprange)))
        self.loss += 0.5 * float(np.add.reduce(np.maximum(plain, clipped, out=plain)))


class RolloutMoments:
    """Mean and sum of squares of one quantity within each rollout and, over all, at each response position."""

    def __init__(self, positions: int) -> None:
        self._means: list[Floats] = []
        self._squares: list[Floats] = []
        self.by_position = Moments.empty(positions)

    def add(self, x: Floats, cells: Cells) -> None:
        """Take in float64 [T], the tokens that `cells` lays out."""
        parts = segment_moments(x, cells.starts, cells.counts, cells.owner)
        of_rollouts = pool(parts, cells.rollout, cells.rollouts)
        self._means.append(of_rollouts.mean)
        self._squares.append(of_rollouts.squares)
        self.by_position = join(self.by_position, pool(parts, cells.position, cells.positions))

    def moments(self, counts: Integers) -> Moments:
        """Moments of each rollout, in order of arrival; `counts`, int64 [m], are their response tokens."""
        return Moments(counts, _concatenate(self._means, np.float64), _concatenate(self._squares, np.float64))


class PredictionSums:
    """Sums of one prediction: errors, absolute errors, co-moments with the returns, the clipped loss."""

    def __init__(self, positions: int, cliprange: float | None) -> None:
        self.error = RolloutMoments(positions)
        self.pairs = CoMoments()
        self.absolute = 0.0
        self.clip = ClipSums()
        self._cliprange = cliprange

    def add(self, v: Floats, g: Floats, old: Floats | None, cells: Cells) -> None:
        """Take in tokens: values, returns and old values (where there are any), float64 [T] each."""
        error = v - g
        self.error.add(error, cells)
        self.absolute += float(np.add.reduce(np.abs(error, out=error)))
        self.pairs.add(v, g)
        if old is not None and self._cliprange is not None:
            self.clip.add(v, g, old, self._cliprange)


@dataclass(slots=True)
class RolloutTable:
    """The rollouts that arrived: prompt group, row number in the data set, length and labels of each."""

    columns: Sequence[str]
    _group: list[Integers] = field(default_factory=list)
    _row: list[Integers] = field(default_factory=list)
    _counts: list[Integers] = field(default_factory=list)
    _codes: dict[str, list[Integers]] = field(default_factory=dict)
    _label_codes: dict[str, dict[object, int]] = field(default_factory=dict)

    def add(self, group: Integers, row: Integers, counts: Integers, labels: dict[str, NDArray[np.generic]]) -> None:
        """Take in rollouts; `labels` holds an array [m] for each name of `columns`."""
        self._group.append(group)
        self._row.append(row)
        self._counts.append(counts)
        for name in self.columns:
            codes_of = self._label_codes.setdefault(name, {})
            column = labels[name]
            distinct, inverse = np.unique(column.astype(str) if column.dtype == object else column, return_inverse=True)
            codes = [codes_of.setdefault(_plain(value), len(codes_of)) for value in distinct.tolist()]
            self._codes.setdefault(name, []).append(np.array(codes, dtype=np.int64)[inverse])

    @property
    def group(self) -> Integers:
        """int64 [m], prompt group keys in order of arrival."""
        return _concatenate(self._group, np.int64)

    @property
    def row(self) -> Integers:
        """int64 [m], row numbers in the data set in order of arrival."""
        return _concatenate(self._row, np.int64)

    @property
    def counts(self) -> Integers:
        """int64 [m], response tokens in order of arrival."""
        return _concatenate(self._counts, np.int64)

    def labels(self, name: str) -> tuple[list[object], Integers]:
        """The distinct values of a column in their own order, and each rollout's index among them."""
        codes_of = self._label_codes.get(name, {})
        try:
            ordered = sorted(codes_of)  # type: ignore[type-var]
        except TypeError:  # files that disagree on the column's type
            ordered = sorted(codes_of, key=str)
        rank = np.empty(len(codes_of), dtype=np.int64)
        rank[[codes_of[value] for value in ordered]] = np.arange(len(codes_of))
        return ordered, rank[_concatenate(self._codes.get(name, []), np.int64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Population:
    """The rollouts that all predictions are judged on, sorted by prompt group.

    Attributes:
        order: int64 [m], from this order to the order of arrival.
        group: int64 [m], index of each rollout's prompt group, rising from 0.
        groups: number of prompt groups.
        rows: int64 [m], row number of each rollout in the data set.
        returns: moments of each rollout's returns.
        by_position: moments of the returns at each response position.
        slices: column -> (its values, int64 [m] index of each rollout's value).
    """

    order: Integers
    group: Integers
    groups: int
    rows: Integers
    returns: Moments
    by_position: Moments
    slices: dict[str, tuple[list[object], Integers]]

    def sort(self, moments: Moments) -> Moments:
        """Moments of each rollout's response tokens, from the order of arrival into this one."""
        return Moments(self.returns.count, moments.mean[self.order], moments.squares[self.order])

    @property
    def arrived_group(self) -> Integers:
        """int64 [m], index of each rollout's prompt group, in order of arrival."""
        group = np.empty_like(self.group)
        group[self.order] = self.group
        return group


def _plain(value: object) -> object:
    """NaN is not equal to itself, so that each would become a label of its own."""
    return "nan" if isinstance(value, float) and value != value else value


def _concatenate(arrays: list[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype)
