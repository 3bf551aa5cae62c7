"""Share the rollouts of a mini-batch out over ranks and micro-batches, by what they cost to compute.

Whole prefix trees go to the rank with the least work so far, the most expensive tree first (longest processing time
first, Graham 1969: within 0.1 % of Karmarkar-Karp here and a thousand times faster). Where that leaves ranks unequal,
trees of the busiest rank are cut between two rollouts: the prefix is then computed once more, so a cut is made only
where the busiest rank gains by it.

What is still unequal then is evened out by single rollouts. A rollout can leave the middle of a tree and join another
part of the same tree, or any other micro-batch: what it costs there depends on how much it shares with the two
rollouts that it then stands between.
"""

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from critic_train.layers.prefix_tree import PrefixOrder
from critic_train.model.tree_cuts import Run, tree_pieces

Positions = NDArray[np.int64]
"""int64 [k], ascending: positions in an order, of rollouts that are computed together."""

MOST_ROLLOUTS = 1024
"""Larger mini-batches are even without exchanges, and the table of common prefixes, [n, n], would be too large."""

TRIED = 8
"""Exchanges of two micro-batches whose work is computed exactly, the most promising first."""

EXCHANGES_A_BIN = 16
"""Exchanges for each micro-batch, at most."""


class Exchanges:
    """Evens out micro-batches by moving or exchanging single rollouts.

    Args:
        full: int64 [n], tokens of the rollout at each position of the order.
        shared: int64 [n], how much each has in common with the one before it.
        pair: the work of one (query, key) pair beside a position's.
    """

    def __init__(self, full: NDArray[np.int64], shared: NDArray[np.int64], pair: float) -> None:
        self._full, self._pair = full, pair
        # common[i, j], i < j: tokens of the prefix that the rollouts at i and j have in common. The rollouts are
        # sorted, so this is the smallest `shared` between them: a running minimum along each row.
        n = len(full)
        above = np.where(np.arange(n)[:, None] < np.arange(n)[None], shared[None], np.iinfo(np.int64).max)
        self._common = np.minimum.accumulate(above, axis=1)

    def tokens(self, positions: Positions) -> int:
        """Forest positions of some rollouts together."""
        return int(self._full[positions].sum() - self._common[positions[:-1], positions[1:]].sum())

    def work(self, positions: Positions) -> float:
        """What they cost together."""
        return float(
            self._own(self._full[positions]).sum() - self._own(self._common[positions[:-1], positions[1:]]).sum()
        )

    def level(self, bins: list[Positions], max_tokens: int, enough: float) -> list[Positions]:
        """Have the busiest micro-batch give a rollout away, or take another for it, as long as that helps.

        Args:
            bins: the micro-batches.
            max_tokens: positions that one which takes a rollout may hold.
            enough: they are level when the busiest has at most this many times the mean work.

        Returns:
            As many micro-batches, which together hold the same rollouts.
        """
        bins = list(bins)
        work = np.asarray([self.work(positions) for positions in bins])
        for _ in range(EXCHANGES_A_BIN * len(bins)):
            busy, *others = np.argsort(-work, kind="stable").tolist()
            if work[busy] <= enough * work.mean() or not any(
                self._exchange(bins, work, busy, other, max_tokens) for other in reversed(others)
            ):
                break
        return bins

    def _exchange(
        self, bins: list[Positions], work: NDArray[np.float64], busy: int, idle: int, max_tokens: int
    ) -> bool:
        """Give one rollout of the busy one for one or none of the idle one; returns whether that lowered the larger."""
        mine, theirs = bins[busy], bins[idle]
        # left[i, j]: the busy one's work where it gives its rollout i and takes the idle one's rollout j; the last j is
        # none. Where the two stand side by side in the order these sums are not exact, so the best few are recomputed.
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

    def _less(self, positions: Positions) -> NDArray[np.float64]:
        """What each of some rollouts takes away with it when it alone leaves (below 0)."""
        before, after = np.append(-1, positions[:-1]), np.append(positions[1:], -1)
        return -self._between(positions, before, after)

    def _more(self, newcomers: Positions, positions: Positions) -> NDArray[np.float64]:
        """What each of some rollouts adds when it alone joins those at `positions`."""
        at = np.searchsorted(positions, newcomers)
        return self._between(newcomers, np.append(-1, positions)[at], np.append(positions, -1)[at])

    def _between(self, positions: Positions, before: Positions, after: Positions) -> NDArray[np.float64]:
        """The work of rollouts that stand between two others; -1 where there is none."""
        # Work is the sum of the rollouts' own work less that of the prefix each shares with the one before. A rollout
        # in between replaces the pair (before, after) by the pairs (before, it) and (it, after).
        up = np.where(before >= 0, self._common[before, positions], 0)
        down = np.where(after >= 0, self._common[positions, after], 0)
        past = np.where((before >= 0) & (after >= 0), self._common[before, after], 0)
        return self._own(self._full[positions]) - self._own(up) - self._own(down) + self._own(past)

    def _own(self, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        return row_work(tokens, self._pair)


def row_work(tokens: NDArray[np.int64], pair: float) -> NDArray[np.float64]:
    """What rows cost, float64 [k], in units of one position's matrix products.

    Args:
        tokens: int64 [k], of each row; its attention has tokens * (tokens + 1) / 2 pairs.
        pair: the cost of one (query, key) pair.
    """
    rows = tokens.astype(np.float64)
    work: NDArray[np.float64] = rows + pair * rows * (rows + 1) / 2
    return work


LEVEL = 1.005
"""Micro-batches are level when the busiest has at most this much more work than the mean."""

CUTS_A_BIN = 16
"""Cuts for each micro-batch, at most."""

MOST_EXCHANGES = 65_536
"""Pairs of ends compared for an exchange between two micro-batches; where there are more, giving alone levels them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a forest costs, in units of one position's matrix products.

    Attributes:
        pair: the cost of one (query, key) pair of attention.
    """

    pair: float

    @classmethod
    def of(cls, parameters: int, layers: int, width: int) -> "Cost":
        """Counted operations: 2 a parameter and position, 4 a pair, layer and unit of all heads together.

        Args:
            parameters: of the decoder layers, without embeddings.
            layers: how many.
            width: heads times head size.
        """
        return cls(pair=2.0 * layers * width / max(1, parameters))


class Pieces:
    """What any run of an order costs, in constant time.

    Args:
        order: the rollouts of a mini-batch, those with a common prefix together.
        lengths: int64 [n], tokens of each rollout of the mini-batch (not in the order).
        cost: the measure.
        cut_as_they_come: see `tree_pieces`.
    """

    def __init__(
        self, order: PrefixOrder, lengths: NDArray[np.int64], cost: Cost, *, cut_as_they_come: bool = False
    ) -> None:
        self._cut_as_they_come = cut_as_they_come
        self.order, self.shared = order, order.shared
        self.full, self.pair = lengths[order.index], cost.pair
        full = self.full.astype(np.float64)
        added = full - order.shared
        self._full_tokens = full
        self._full_work = row_work(self.full, cost.pair)
        work = added + cost.pair * (added * order.shared + added * (added + 1) / 2)
        self._tokens_before = np.concatenate([[0.0], np.cumsum(added)])
        self._work_before = np.concatenate([[0.0], np.cumsum(work)])

    def work(self, start: NDArray[np.int64] | int, stop: NDArray[np.int64] | int) -> NDArray[np.float64]:
        """float64: cost of the runs start:stop, int64 of any shape (they broadcast).

        The first rollout of a run is computed from its first token on, the others from where they leave the one before.
        """
        return self._full_work[start] + self._work_before[stop] - self._work_before[np.asarray(start) + 1]  # type: ignore[no-any-return]

    def work_of_runs(self, runs: NDArray[np.int64]) -> NDArray[np.float64]:
        """float64 [k]: cost of runs int64 [k, 2]; an empty run costs nothing."""
        filled = runs[:, 0] < runs[:, 1]
        work = np.zeros(len(runs))
        work[filled] = self.work(runs[filled, 0], runs[filled, 1])
        return work

    def work_together(self, positions: Positions) -> float:
        """Cost of rollouts at some positions, ascending, whatever stands between them."""
        shared = self.order.part(positions).shared
        return float((self._full_work[positions] - row_work(shared, self.pair)).sum())

    def tokens(self, start: int, stop: int) -> int:
        """Forest positions of a run."""
        return int(self._full_tokens[start] + self._tokens_before[stop] - self._tokens_before[start + 1])

    def trees(self, max_tokens: int) -> list[Run]:
        """The prefix trees of the order, cut between rollouts where one is larger than `max_tokens`."""
        return tree_pieces(self.full, self.shared, max_tokens, as_they_come=self._cut_as_they_come)


def shares(pieces: Pieces, ranks: int, max_tokens: int) -> list[list[Positions]]:
    """The micro-batches of each rank: `shares(...)[rank][number]` are the positions of one, ascending.

    Every rank has the same number of micro-batches, since ranks go through them in step; those that are computed at
    the same time cost about the same. Some may be empty.

    Args:
        pieces: the mini-batch.
        ranks: how many.
        max_tokens: positions a micro-batch may hold; a single rollout longer than that goes alone.

    Returns:
        Together they hold every rollout once.
    """
    runs = pieces.trees(max_tokens)
    tokens = sum(pieces.tokens(*run) for run in runs)
    count = max(1, -(-tokens // (ranks * max_tokens)))
    while True:
        # Balancing moves rollouts between micro-batches and may overfill one. With a micro-batch for every tree it is
        # left out: then each holds at most one tree, which `trees` has cut to the budget, and the loop ends.
        level = ranks * count < len(runs) + 3 * ranks
        held = _bins(pieces, runs, ranks * count, level=level)
        if all(_fits(pieces, bin, max_tokens) for bin in held):
            break
        count += 1
    bins = [np.concatenate([np.zeros(0, np.int64), *(np.arange(*run) for run in sorted(mine))]) for mine in held]
    if ranks > 1 and len(pieces.shared) <= MOST_ROLLOUTS:
        bins = Exchanges(pieces.full, pieces.shared, pieces.pair).level(bins, max_tokens, LEVEL)
    bins.sort(key=lambda positions: -pieces.work_together(positions))
    # Every second row backwards, so that no rank has the most expensive of each.
    rows = [bins[ranks * n : ranks * (n + 1)][:: -1 if n % 2 else 1] for n in range(count)]
    return [[row[rank] for row in rows] for rank in range(ranks)]


def _bins(pieces: Pieces, runs: list[Run], bins: int, *, level: bool) -> list[list[Run]]:
    """Runs in a number of bins that cost about the same."""
    work = [float(pieces.work(*run)) for run in runs]
    held = [[runs[i] for i in members] for members in longest_first(work, bins)]
    loads = np.asarray([sum(float(pieces.work(*run)) for run in mine) for mine in held])
    for _ in range(CUTS_A_BIN * bins if level else 0):
        busiest, *others = np.argsort(-loads, kind="stable").tolist()
        if loads[busiest] <= LEVEL * loads.mean() or not any(
            _level(pieces, held, loads, busiest, other) for other in reversed(others)
        ):
            break
    return held


def _fits(pieces: Pieces, runs: list[Run], max_tokens: int) -> bool:
    alone = len(runs) == 1 and runs[0][1] - runs[0][0] == 1
    return alone or sum(pieces.tokens(*run) for run in runs) <= max_tokens


def longest_first(work: list[float], bins: int) -> list[list[int]]:
    """Item numbers of each bin: the most expensive item first, each into the bin with the least work so far."""
    held: list[list[int]] = [[] for _ in range(bins)]
    least = [(0.0, number) for number in range(bins)]
    for item in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        load, number = least[0]
        held[number].append(item)
        heapq.heapreplace(least, (load + work[item], number))
    return held


def _level(pieces: Pieces, held: list[list[Run]], loads: NDArray[np.float64], busy: int, idle: int) -> bool:
    """Give the end of a run of one rank to another, for the end of a run of that one or for nothing.

    Returns:
        Whether that lowered the larger of the two loads; otherwise nothing was changed.
    """
    given, taken = _ends(held[busy]), _ends(held[idle])
    taken = np.concatenate([[(0, 0, 0)], taken if len(given) * len(taken) <= MOST_EXCHANGES else taken[:0]])
    # A cut costs its prefix twice: what stays and what goes are both priced as runs of their own.
    gives, leaves = (
        pieces.work_of_runs(given[:, 1:]),
        pieces.work_of_runs(given[:, :2]) - pieces.work_of_runs(given[:, [0, 2]]),
    )
    returns, remains = (
        pieces.work_of_runs(taken[:, 1:]),
        pieces.work_of_runs(taken[:, :2]) - pieces.work_of_runs(taken[:, [0, 2]]),
    )
    busy_load = loads[busy] + leaves[:, None] + returns[None]
    idle_load = loads[idle] + remains[None] + gives[:, None]
    larger = np.maximum(busy_load, idle_load)
    at = np.unravel_index(int(larger.argmin()), larger.shape)
    if larger[at] >= loads[busy] * (1 - 1e-9):
        return False
    for giver, taker, (start, cut, stop) in ((busy, idle, given[at[0]].tolist()), (idle, busy, taken[at[1]].tolist())):
        if stop:
            held[giver].remove((start, stop))
            held[giver] += [(start, cut)] if cut > start else []
            held[taker].append((cut, stop))
    loads[busy], loads[idle] = busy_load[at], idle_load[at]
    return True


def _ends(runs: list[Run]) -> NDArray[np.int64]:
    """int64 [k, 3]: (start, cut, stop) for every way to cut a run in two, or to take all of it (cut = start)."""
    cuts = [np.arange(start, stop) for start, stop in runs]
    bounds = np.repeat(np.asarray(runs, dtype=np.int64).reshape(-1, 2), [len(c) for c in cuts], axis=0)
    return np.stack([bounds[:, 0], np.concatenate([*cuts, np.zeros(0, dtype=np.int64)]), bounds[:, 1]], axis=1)
