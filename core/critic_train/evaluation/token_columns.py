"""Columns of tokens that are read several times, and what is computed from them in bounded memory.

`TokenStore` keeps columns in memory while they are small and in an unlinked temporary file beyond. `RankCorrelation` is
Spearman's over any number of tokens; `order_statistics` gives exact quantiles.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from critic_train.errors import MachineError
from critic_train.evaluation.moments import Floats, Integers, TokenColumn

MEMORY_BYTES = 2**24
BLOCK_TOKENS = 2**15


class TokenStore:
    """Float32 columns of equal length that are appended to and read back in blocks of whole rollouts.

    The files have no name on disk, so the kernel deletes them when the process ends, however it ends.
    """

    def __init__(self, names: Sequence[str], *, memory_bytes: int = MEMORY_BYTES) -> None:
        """Args:
        names: the columns.
        memory_bytes: size up to which a column stays in memory.
        """
        # A SpooledTemporaryFile has no name on disk: it is deleted when it is closed, here when it is collected.
        self._files = {name: tempfile.SpooledTemporaryFile(memory_bytes) for name in names}  # noqa: SIM115

    def append(self, name: str, tokens: TokenColumn) -> None:
        """Add float32 [T] at the column's end. Raises MachineError where the disk has no room."""
        file = self._files[name]
        try:
            file.seek(0, 2)
            file.write(np.ascontiguousarray(tokens, dtype=np.float32).tobytes())
        except OSError as error:
            raise MachineError(
                f"cannot write to the temporary folder {tempfile.gettempdir()}: {error.strerror}",
                hint="set TMPDIR to a folder with room for 4 bytes a response token and critic",
            ) from error

    def blocks(self, name: str, lengths: Integers) -> Iterator[TokenColumn]:
        """Read a column from its start, block by block as `block_slices(lengths)` cuts it.

        Args:
            name: of the column.
            lengths: int64 [m], tokens of each rollout.

        Yields:
            float32 [tokens of the block].
        """
        position = 0
        for part in block_slices(lengths):
            size = 4 * int(lengths[part].sum())
            file = self._files[name]
            file.seek(position)  # each time: several readers may take turns
            yield np.frombuffer(file.read(size), dtype=np.float32)
            position += size


def block_slices(lengths: Integers) -> Iterator[slice]:
    """Runs of rollouts of about BLOCK_TOKENS tokens each (one rollout at least).

    Args:
        lengths: int64 [m], tokens of each rollout.
    """
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + BLOCK_TOKENS, side="right"))
        stop = max(stop, start + 1)
        yield slice(start, stop)
        start = stop


EXACT_TOKENS = 2**20
BINS = 2**20

Blocks = Callable[[], Iterator[TokenColumn]]


class RankCorrelation:
    """Spearman's correlation of the returns with one prediction after another; ties get average ranks.

    Up to `exact_tokens` tokens the ranks are exact. Beyond, numbers are ranked by a histogram of the order
    of their float32 bit patterns, `bins` bins from the smallest to the largest: numbers of one bin count as
    tied. Where the patterns in use span fewer than `bins`, that is exact too. Otherwise let w be the
    within-bin sum of squares of the true ranks, at most sum(m^3 - m) / 12 over bins of m tokens that differ, as a share
    of the ranks' whole sum of squares. Binned ranks are the true ones projected onto the bins, an angle of
    asin(sqrt(w)) away, so the correlation is off by at most the sum of the two columns' angles. Numbers
    spread evenly over a factor of two fall into at least 2^11 bins (float32 has 2^23 patterns there), which
    makes the angle at most 4.9e-4; the errors of both columns mostly cancel and far less remains.
    `error_bound` gives the bound for the data at hand.
    """

    def __init__(self, returns: Blocks, tokens: int, *, exact_tokens: int = EXACT_TOKENS, bins: int = BINS) -> None:
        """Args:
        returns: reads float32 blocks from the start, each time it is called.
        tokens: their number in all.
        exact_tokens: most tokens whose ranks are computed exactly.
        bins: most histogram bins beyond that.
        """
        self._returns = returns
        self._exact = tokens <= exact_tokens
        self._bins = bins
        self._tokens = tokens
        self.error_bound = 0.0
        if self._exact:
            self._ranks = centred_ranks(_concatenate(returns))
        else:
            self._table = _RankTable(returns, tokens, bins)

    def against(self, values: Blocks) -> float | None:
        """Correlation with a prediction, read in the same blocks; None where either does not vary."""
        if self._tokens == 0:
            return None
        if self._exact:
            ranks = centred_ranks(_concatenate(values))
            sums = _sums(ranks, self._ranks)
        else:
            table = _RankTable(values, self._tokens, self._bins)
            sums = np.zeros(3)
            for v, g in zip(values(), self._returns(), strict=True):
                sums += _sums(table.ranks(v), self._table.ranks(g))
            self.error_bound = table.angle + self._table.angle
        squares_v, squares_g, cross = (float(s) for s in sums)
        if squares_v <= 0.0 or squares_g <= 0.0:
            return None
        return min(1.0, max(-1.0, cross / math.sqrt(squares_v) / math.sqrt(squares_g)))


def centred_ranks(x: TokenColumn) -> Floats:
    """Average ranks of float32 [T], less their mean: float64 [T]."""
    order = np.argsort(x)
    ordered = x[order]
    new = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(x) else np.empty(0, int)
    counts = np.diff(np.append(new, len(x)))
    ranks = np.empty(len(x))
    ranks[order] = np.repeat(new + (counts - 1) / 2 - (len(x) - 1) / 2, counts)
    return ranks


def sortable(x: TokenColumn) -> Integers:
    """Integers in the order of the floats: float32 [T] -> int64 [T], equal for -0 and 0."""
    # IEEE 754: the bits of positive floats are in the order of the floats; those of negative ones, without the sign
    # bit, in the reverse order, hence the minus. Both zeros become 0.
    bits = np.ascontiguousarray(x).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


class _RankTable:
    """Centred average ranks by histogram bin."""

    def __init__(self, blocks: Blocks, tokens: int, bins: int) -> None:
        low, high = 2**32, -(2**32)
        for block in blocks():
            low = min(low, int(sortable(block.min(keepdims=True))[0]))
            high = max(high, int(sortable(block.max(keepdims=True))[0]))
        self._low = low
        self._shift = 0
        while (high - low) >> self._shift >= bins:
            self._shift += 1
        counts = np.zeros(((high - low) >> self._shift) + 1, dtype=np.int64)
        mixed = self._count(blocks, counts)
        # Numbers of a bin count as tied: each gets the mean of the ranks below..below+counts-1, here less the mean
        # rank.
        below = np.cumsum(counts) - counts
        self._ranks: Floats = below + (counts - 1) / 2 - (tokens - 1) / 2
        size = counts.astype(np.float64)
        lost = float(np.sum((size**3 - size)[mixed])) / 12
        ordered = float(np.sum(size * self._ranks**2))
        self.angle = math.atan2(math.sqrt(lost), math.sqrt(ordered))

    def _count(self, blocks: Blocks, counts: Integers) -> NDArray[np.bool_]:
        """Fill the histogram; say which bins hold different numbers (equal ones are true ties)."""
        mixed = np.zeros(len(counts), dtype=np.bool_)
        remainder = np.zeros(len(counts), dtype=np.uint32)
        for block in blocks():
            key = sortable(block) - self._low
            bins = key >> self._shift
            if self._shift:
                # The first number of a bin is remembered by its lower bits; any other lower bits make the bin mixed.
                rest = (key & ((1 << self._shift) - 1)).astype(np.uint32)
                new = counts[bins] == 0
                remainder[bins[new]] = rest[new]
                mixed[bins[remainder[bins] != rest]] = True
            np.add.at(counts, bins, 1)
        return mixed

    def _bin(self, block: TokenColumn) -> Integers:
        return (sortable(block) - self._low) >> self._shift

    def ranks(self, block: TokenColumn) -> Floats:
        return self._ranks[self._bin(block)]


def _sums(v: Floats, g: Floats) -> Floats:
    return np.array([np.add.reduce(v * v), np.add.reduce(g * g), np.add.reduce(v * g)])


def _concatenate(blocks: Blocks) -> TokenColumn:
    parts = list(blocks())
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)


HALF_BITS = 16
HALF = 2**HALF_BITS


def order_statistics(blocks: Blocks, ranks: Integers) -> TokenColumn:
    """The numbers at the given ranks of a column.

    Two passes over the order-keeping bit patterns of the float32 numbers: the first counts their upper halves, which
    says in which of 65,536 buckets each rank falls; the second counts the lower halves within those buckets alone.

    Args:
        blocks: reads float32 blocks from the start, each time it is called.
        ranks: int64 [k], from 0, each below the number of tokens.

    Returns:
        float32 [k].
    """
    upper = np.zeros(HALF, dtype=np.int64)
    for block in blocks():
        upper += np.bincount(_pattern(block) >> HALF_BITS, minlength=HALF)
    ends = np.cumsum(upper)
    bucket = np.searchsorted(ends, ranks, side="right")
    wanted = np.unique(bucket)
    lower = np.zeros((len(wanted), HALF), dtype=np.int64)
    for block in blocks():
        pattern = _pattern(block)
        high = pattern >> HALF_BITS
        for row, one in enumerate(wanted):
            inside = pattern[high == one] & (HALF - 1)
            if len(inside):
                lower[row] += np.bincount(inside, minlength=HALF)
    patterns = np.empty(len(ranks), dtype=np.int64)
    for k, (rank, one) in enumerate(zip(ranks, bucket, strict=True)):
        before = ends[one] - upper[one]
        counts = lower[np.searchsorted(wanted, one)]
        low = int(np.searchsorted(np.cumsum(counts), rank - before, side="right"))
        patterns[k] = (int(one) << HALF_BITS) + low
    return _number(patterns)


def part_ranks(count: int, parts: int) -> Integers:
    """int64 [parts - 1], the ranks at which `parts` equal parts of `count` sorted numbers begin, but the first."""
    return np.arange(1, parts, dtype=np.int64) * count // parts


Numbers = TypeVar("Numbers", TokenColumn, Integers)


def distinct_edges(lowest: float, starts: Numbers) -> Numbers:
    """The inner edges of quantile bins: bin of x = number of edges <= x.

    Equal numbers belong to one bin, so bins that begin at the same number are one.

    Args:
        lowest: the smallest number; a bin that begins there is the first.
        starts: [k], the numbers at `part_ranks`.
    """
    edges = np.unique(starts)
    return edges[edges > lowest]


def _pattern(x: TokenColumn) -> Integers:
    """int64 in 0..2^32-1, in the order of the floats."""
    return sortable(x) + 2**31


def _number(pattern: Integers) -> TokenColumn:
    signed = pattern - 2**31
    bits = np.where(signed < 0, -signed | 0x80000000, signed)
    return bits.astype(np.uint32).view(np.float32)
