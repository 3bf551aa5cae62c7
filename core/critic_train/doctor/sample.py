"""A sample of whole prompt groups, of bounded size, that does not depend on the order in which rollouts come."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from critic_train.data.order import mixed
from critic_train.rollouts import Rollouts, joined

SAMPLE_TOKENS = 2**22
SEED = 0x5EED


class GroupSample:
    """Keeps the prompt groups whose hashed key is smallest, as many as fit (a bottom-k sketch of the groups).

    Every rollout of a kept group is kept, wherever it stands in the data set. As long as the data set fits, the
    sample is the data set.

    Args:
        most_tokens: tokens kept; a single group larger than that is kept whole.

    Attributes:
        is_everything: whether nothing was left out.
    """

    def __init__(self, most_tokens: int = SAMPLE_TOKENS) -> None:
        self.is_everything = True
        self._most_tokens = most_tokens
        self._parts: list[Rollouts] = []
        self._tokens = 0
        self._limit = 2**64
        """Groups hashed at or above it were dropped once, and stay so."""

    def add(self, rollouts: Rollouts) -> None:
        """Take in some rollouts."""
        ranks = mixed(rollouts.group, SEED)
        kept = _below(ranks, self._limit)
        if not kept.all():
            self.is_everything = False
            rollouts = rollouts.take(np.flatnonzero(kept))
        if not len(rollouts):
            return
        self._parts.append(replace(rollouts, labels={}))
        self._tokens += len(rollouts.input_ids)
        if self._tokens > 2 * self._most_tokens:
            self._shrink()

    def rollouts(self) -> Rollouts | None:
        """The sample, prompt groups together; None where nothing came."""
        if not self._parts:
            return None
        self._shrink()
        (whole,) = self._parts
        return whole.take(np.argsort(whole.group, kind="stable"))

    def _shrink(self) -> None:
        """Drop the groups of largest hash until the rest fits; one group always stays."""
        whole = joined(self._parts)
        ranks = mixed(whole.group, SEED)
        order = np.argsort(ranks, kind="stable")
        tokens = np.cumsum(whole.lengths[order])
        first_out = int(np.searchsorted(tokens, self._most_tokens, side="right"))
        if first_out < len(order):
            limit = max(int(ranks[order[first_out]]), int(ranks[order[0]]) + 1)
            whole = whole.take(np.flatnonzero(_below(ranks, limit)))
            self.is_everything &= len(whole) == len(order)
            self._limit = limit
        self._parts, self._tokens = [whole], len(whole.input_ids)


def _below(ranks: NDArray[np.uint64], limit: int) -> NDArray[np.bool_]:
    return ranks < np.uint64(limit) if limit < 2**64 else np.ones(len(ranks), dtype=np.bool_)
