"""Quantiles of any number of tokens, exact, in bounded memory."""

from typing import TypeVar

import numpy as np

from critic_train.judging.moments import Integers
from critic_train.judging.ranks import Blocks, Column, sortable

HALF_BITS = 16
HALF = 2**HALF_BITS


def order_statistics(blocks: Blocks, ranks: Integers) -> Column:
    """The numbers at the given places of the whole column, sorted.

    Two passes over the order-keeping bit patterns of the float32 numbers: the first counts their upper halves, which
    says in which of 65,536 buckets each place falls; the second counts the lower halves within those buckets alone.

    Args:
        blocks: reads float32 blocks from the start, each time it is called.
        ranks: int64 [k], places from 0, each below the number of tokens.

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
    found = np.empty(len(ranks), dtype=np.int64)
    for k, (rank, one) in enumerate(zip(ranks, bucket, strict=True)):
        before = ends[one] - upper[one]
        counts = lower[np.searchsorted(wanted, one)]
        low = int(np.searchsorted(np.cumsum(counts), rank - before, side="right"))
        found[k] = (int(one) << HALF_BITS) + low
    return _number(found)


def part_ranks(count: int, parts: int) -> Integers:
    """int64 [parts - 1], the places at which `parts` equal parts of `count` sorted numbers begin, but the first."""
    return np.arange(1, parts, dtype=np.int64) * count // parts


Numbers = TypeVar("Numbers", Column, Integers)


def distinct_edges(lowest: float, starts: Numbers) -> Numbers:
    """The inner edges of quantile bins: bin of x = number of edges <= x.

    Equal numbers belong to one bin, so bins that begin at the same number are one.

    Args:
        lowest: the smallest number; a bin that begins there is the first.
        starts: [k], the numbers at `part_ranks`.
    """
    edges = np.unique(starts)
    return edges[edges > lowest]


def _pattern(x: Column) -> Integers:
    """int64 in 0..2^32-1, in the order of the floats."""
    return sortable(x) + 2**31


def _number(pattern: Integers) -> Column:
    signed = pattern - 2**31
    bits = np.where(signed < 0, -signed | 0x80000000, signed)
    return bits.astype(np.uint32).view(np.float32)
