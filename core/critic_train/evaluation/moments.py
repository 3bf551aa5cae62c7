"""Counts, means and sums of squares of many sets of numbers at once, and how to pool them.

Everything is float64. Means are taken as a reference element plus the mean distance from it, sums of
squares about the mean itself (two passes; Chan, Golub and LeVeque 1983 for pooling). So an offset of 1e6
costs no digits, and a set of equal numbers has a sum of squares of exactly 0, which is how "no variance"
is recognised everywhere. `leave_one_out` is the group mean that a critic has to beat.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
TokenColumn = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Moments:
    """k sets of numbers.

    Attributes:
        count: int64 [k], numbers in each set.
        mean: float64 [k]; 0 for an empty set.
        squares: float64 [k], sum of squared deviations from the set's own mean.
    """

    count: Integers
    mean: Floats
    squares: Floats

    def __getitem__(self, index: Integers) -> "Moments":
        return Moments(self.count[index], self.mean[index], self.squares[index])

    @classmethod
    def empty(cls, sets: int) -> "Moments":
        """`sets` sets without numbers."""
        return cls(np.zeros(sets, np.int64), np.zeros(sets), np.zeros(sets))


def segment_moments(x: Floats, starts: Integers, counts: Integers, owner: Integers) -> Moments:
    """Moments of consecutive segments that cover all of x.

    Args:
        x: float64 [T].
        starts: int64 [k], rising, the first is 0.
        counts: int64 [k], each at least 1, their sum is T.
        owner: int64 [T], the segment of each number.
    """
    if not len(starts):
        return Moments.empty(0)
    first = x[starts]
    deviation, base = np.empty_like(x), np.empty_like(x)
    # take into an array that exists is five times as fast as repeat.
    np.take(first, owner, out=base, mode="clip")
    np.subtract(x, base, out=deviation)
    mean = first + np.add.reduceat(deviation, starts) / counts
    # Not by correcting the sum of squares about `first`: where `first` is an outlier that would cancel.
    np.take(mean, owner, out=base, mode="clip")
    np.subtract(x, base, out=deviation)
    np.multiply(deviation, deviation, out=deviation)
    return Moments(counts, mean, np.add.reduceat(deviation, starts))


def pool(parts: Moments, key: Integers, sets: int) -> Moments:
    """Moments of the unions of the parts that share a key.

    Args:
        parts: k disjoint sets, none of them empty.
        key: int64 [k], in 0..sets-1.
        sets: number of unions; those that no key names are empty.
    """
    weight = parts.count.astype(np.float64)
    total = sums_by_key(weight, key, sets)
    reference = np.zeros(sets)
    reference[key] = parts.mean
    shift = sums_by_key(weight * (parts.mean - reference[key]), key, sets)
    mean = reference + shift / np.maximum(total, 1.0)
    between = parts.mean - mean[key]
    squares = sums_by_key(parts.squares + weight * between * between, key, sets)
    return Moments(total.astype(np.int64), mean, squares)


def sums_by_key(x: Floats, key: Integers, keys: int) -> Floats:
    """float64 [keys], the sums of the x [k] that share a key [k] in 0..keys-1."""
    return np.bincount(key, weights=x, minlength=keys).astype(np.float64, copy=False)


def pool_all(parts: Moments) -> Moments:
    """One set: the union of all parts."""
    return pool(parts, np.zeros(len(parts.count), np.int64), 1)


def join(a: Moments, b: Moments) -> Moments:
    """Set by set, the union of a's and b's; either may be empty."""
    sets = len(a.count)
    key = np.tile(np.arange(sets), 2)
    both = Moments(
        np.concatenate([a.count, b.count]),
        np.concatenate([a.mean, b.mean]),
        np.concatenate([a.squares, b.squares]),
    )
    filled = np.flatnonzero(both.count)
    return pool(both[filled], key[filled], sets)


@dataclass(slots=True)
class CoMoments:
    """Running means, sums of squares and the sum of cross products of pairs (v, g)."""

    count: int = 0
    mean_v: float = 0.0
    mean_g: float = 0.0
    squares_v: float = 0.0
    squares_g: float = 0.0
    cross: float = 0.0

    def add(self, v: Floats, g: Floats) -> None:
        """Take in float64 [T] pairs; T may be 0."""
        n = len(v)
        if not n:
            return
        mean_v = float(v[0] + np.add.reduce(v - v[0]) / n)
        mean_g = float(g[0] + np.add.reduce(g - g[0]) / n)
        dv, dg = v - mean_v, g - mean_g
        if not self.count:
            self.mean_v, self.mean_g = mean_v, mean_g
        total = self.count + n
        share = self.count * n / total
        apart_v, apart_g = mean_v - self.mean_v, mean_g - self.mean_g
        self.cross += float(np.add.reduce(dv * dg)) + share * apart_v * apart_g
        self.squares_v += float(np.add.reduce(np.multiply(dv, dv, out=dv))) + share * apart_v**2
        self.squares_g += float(np.add.reduce(np.multiply(dg, dg, out=dg))) + share * apart_g**2
        self.mean_v += apart_v * n / total
        self.mean_g += apart_g * n / total
        self.count = total

    def correlation(self) -> float | None:
        """Pearson's correlation; None where v or g does not vary."""
        if self.squares_v <= 0.0 or self.squares_g <= 0.0:
            return None
        # Two square roots: the product of the sums of squares could overflow or vanish.
        r = self.cross / np.sqrt(self.squares_v) / np.sqrt(self.squares_g)
        return float(min(1.0, max(-1.0, r)))


def leave_one_out(mean_returns: Floats, group: Integers, alone: float) -> tuple[Floats, int]:
    """The mean of the other rollouts of the prompt group.

    GRPO's baseline (Shao et al. 2024, DeepSeekMath, with the group mean) in its unbiased, leave-one-out form
    (RLOO, Ahmadian et al. 2024). A rollout's mean return is its reward when gamma = lambda = 1.

    Args:
        mean_returns: float64 [m], mean return over each rollout's response tokens.
        group: int64 [m], index of its prompt group, from 0.
        alone: the figure for rollouts that are alone in their group.

    Returns:
        (float64 [m], number of rollouts that are alone).
    """
    size = np.bincount(group)
    reference = np.zeros(len(size))
    reference[group] = mean_returns
    # Distances from a member of the group: equal returns then have exactly their own value as mean.
    distance = mean_returns - reference[group]
    others = np.bincount(group, weights=distance)[group] - distance
    peers = size[group] - 1
    lone = peers == 0
    means = reference[group] + others / np.maximum(peers, 1)
    return np.where(lone, alone, means), int(np.count_nonzero(lone))
