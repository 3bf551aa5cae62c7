"""What is kept of the tokens: sums per rollout, per response position and over all, for each prediction.

A prediction is anything that names a value for every response token: a critic, the stored values, a
baseline. The error is E = V - G, the value less the return.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from critic_train.evaluation.moments import CoMoments, Floats, Integers, Moments, join, pool, segment_moments


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
        whole = pool(parts, cells.rollout, cells.rollouts)
        self._means.append(whole.mean)
        self._squares.append(whole.squares)
        self.by_position = join(self.by_position, pool(parts, cells.position, cells.positions))

    def moments(self, counts: Integers) -> Moments:
        """Moments of each rollout, in order of arrival; `counts` are their response tokens."""
        return Moments(counts, _joined(self._means, np.float64), _joined(self._squares, np.float64))


class PredictionSums:
    """All that is kept of one prediction."""

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
    """Which rollouts arrived: their prompt group, place in the data set, length and labels."""

    columns: Sequence[str]
    _group: list[Integers] = field(default_factory=list)
    _row: list[Integers] = field(default_factory=list)
    _counts: list[Integers] = field(default_factory=list)
    _codes: dict[str, list[Integers]] = field(default_factory=dict)
    _known: dict[str, dict[object, int]] = field(default_factory=dict)

    def add(self, group: Integers, row: Integers, counts: Integers, labels: dict[str, NDArray[np.generic]]) -> None:
        """Take in rollouts; `labels` holds an array [m] for each name of `columns`."""
        self._group.append(group)
        self._row.append(row)
        self._counts.append(counts)
        for name in self.columns:
            known = self._known.setdefault(name, {})
            column = labels[name]
            distinct, inverse = np.unique(column.astype(str) if column.dtype == object else column, return_inverse=True)
            codes = [known.setdefault(_plain(value), len(known)) for value in distinct.tolist()]
            self._codes.setdefault(name, []).append(np.array(codes, dtype=np.int64)[inverse])

    @property
    def group(self) -> Integers:
        """int64 [m], prompt group keys in order of arrival."""
        return _joined(self._group, np.int64)

    @property
    def row(self) -> Integers:
        """int64 [m], places in the data set in order of arrival."""
        return _joined(self._row, np.int64)

    @property
    def counts(self) -> Integers:
        """int64 [m], response tokens in order of arrival."""
        return _joined(self._counts, np.int64)

    def labels(self, name: str) -> tuple[list[object], Integers]:
        """The distinct values of a column in their own order, and each rollout's index among them."""
        known = self._known.get(name, {})
        try:
            ordered = sorted(known)  # type: ignore[type-var]
        except TypeError:  # files that disagree on the column's type
            ordered = sorted(known, key=str)
        place = np.empty(len(known), dtype=np.int64)
        place[[known[value] for value in ordered]] = np.arange(len(known))
        return ordered, place[_joined(self._codes.get(name, []), np.int64)]


def _plain(value: object) -> object:
    """NaN is not equal to itself, so that each would become a label of its own."""
    return "nan" if isinstance(value, float) and value != value else value


def _joined(arrays: list[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype)
