"""Even out micro-batches by single rollouts, where whole prefix trees and their ends were too coarse to deal out.

A rollout can leave the middle of a tree and join another part of the same tree, or any other micro-batch: what it
costs there depends on how much it shares with the two rollouts that it then stands between.
"""

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.int64]
"""int64 [k], ascending: places of an order whose rollouts are computed together."""

MOST_ROLLOUTS = 1024
"""Mini-batches with more have small enough trees to be dealt out as they are; what rollouts share is a square table."""

TRIED = 8
"""Exchanges of two micro-batches that are looked at exactly, the most promising first."""

EXCHANGES_A_BIN = 16
"""For each micro-batch; then they are taken as they are."""


class Exchanges:
    """What a micro-batch costs with a rollout more or less.

    Args:
        full: int64 [n], tokens of the rollout at each place of the order.
        shared: int64 [n], how much each has in common with the one before it.
        pair: the work of one (query, key) pair beside a position's.
    """

    def __init__(self, full: NDArray[np.int64], shared: NDArray[np.int64], pair: float) -> None:
        self._full, self._pair = full, pair
        # common[i, j], i < j: the prefix that the rollouts at i and j have in common.
        n = len(full)
        above = np.where(np.arange(n)[:, None] < np.arange(n)[None], shared[None], np.iinfo(np.int64).max)
        self._common = np.minimum.accumulate(above, axis=1)

    def tokens(self, places: Places) -> int:
        """Forest positions of some rollouts together."""
        return int(self._full[places].sum() - self._common[places[:-1], places[1:]].sum())

    def work(self, places: Places) -> float:
        """What they cost together."""
        return float(self._own(self._full[places]).sum() - self._own(self._common[places[:-1], places[1:]]).sum())

    def level(self, bins: list[Places], max_tokens: int, enough: float) -> list[Places]:
        """Have the busiest micro-batch give a rollout away, or take another for it, as long as that helps.

        Args:
            bins: the micro-batches.
            max_tokens: positions that one which takes a rollout may hold.
            enough: they are level when the busiest has at most this many times the mean work.

        Returns:
            As many micro-batches, which together hold the same rollouts.
        """
        bins = list(bins)
        work = np.asarray([self.work(places) for places in bins])
        for _ in range(EXCHANGES_A_BIN * len(bins)):
            busy, *others = np.argsort(-work, kind="stable").tolist()
            if work[busy] <= enough * work.mean() or not any(
                self._exchange(bins, work, busy, other, max_tokens) for other in reversed(others)
            ):
                break
        return bins

    def _exchange(self, bins: list[Places], work: NDArray[np.float64], busy: int, idle: int, max_tokens: int) -> bool:
        """Give one rollout of the busy one for one or none of the idle one; returns whether that lowered the larger."""
        mine, theirs = bins[busy], bins[idle]
        # Beside what is there: "nothing" is given back last. Two exchanged rollouts that were neighbours make these
        # sums inexact, so the best few are worked out anew.
        left = work[busy] + self._less(mine)[:, None] + np.append(self._more(theirs, mine), 0.0)[None]
        right = work[idle] + self._more(mine, theirs)[:, None] + np.append(self._less(theirs), 0.0)[None]
        larger = np.maximum(left, right)
        for flat in np.argsort(larger, axis=None, kind="stable")[:TRIED].tolist():
            given, taken = np.unravel_index(flat, larger.shape)
            ours = np.append(np.delete(mine, given), theirs[taken : taken + 1])
            others = np.append(np.delete(theirs, np.arange(len(theirs)) == taken), mine[given])
            ours.sort()
            others.sort()
            after = self.work(ours), self.work(others)
            fits = all(len(each) == 1 or self.tokens(each) <= max_tokens for each in (ours, others))
            if fits and max(after) < work[busy] * (1 - 1e-9):
                bins[busy], bins[idle] = ours, others
                work[busy], work[idle] = after
                return True
        return False

    def _less(self, places: Places) -> NDArray[np.float64]:
        """What each of some rollouts takes away with it when it alone leaves (below 0)."""
        before, after = np.append(-1, places[:-1]), np.append(places[1:], -1)
        return -self._between(places, before, after)

    def _more(self, newcomers: Places, places: Places) -> NDArray[np.float64]:
        """What each of some rollouts adds when it alone joins those at `places`."""
        at = np.searchsorted(places, newcomers)
        return self._between(newcomers, np.append(-1, places)[at], np.append(places, -1)[at])

    def _between(self, places: Places, before: Places, after: Places) -> NDArray[np.float64]:
        """The work of rollouts that stand between two others; -1 where there is none."""
        up = np.where(before >= 0, self._common[before, places], 0)
        down = np.where(after >= 0, self._common[places, after], 0)
        past = np.where((before >= 0) & (after >= 0), self._common[before, after], 0)
        return self._own(self._full[places]) - self._own(up) - self._own(down) + self._own(past)

    def _own(self, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        return row_work(tokens, self._pair)


def row_work(tokens: NDArray[np.int64], pair: float) -> NDArray[np.float64]:
    """What rows of some tokens cost, each from its first token on, where a pair of attention costs `pair`."""
    rows = tokens.astype(np.float64)
    found: NDArray[np.float64] = rows + pair * rows * (rows + 1) / 2
    return found
