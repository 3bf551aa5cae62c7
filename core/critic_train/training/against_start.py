"""Whether training has made a critic better than the exact head it began with, on the held-out rollouts.

Both are judged on the same rollouts, so it is their difference that is compared, by prompt group: what makes one prompt
harder than another falls out of it, and its interval is several times narrower than that of either figure. What this
needs of the critic at step 0 are sums over its errors, which a checkpoint holds; its values are not kept.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from critic_train.evaluation.metrics import is_better
from critic_train.evaluation.moments import sums_by_key
from critic_train.evaluation.resampling import FEW_GROUPS, Resampling, explained_in_resamples
from critic_train.rollouts import Rollouts

Floats = NDArray[np.float64]
Sums = list[list[float]]
"""Of each block of prompt groups: sums of errors, of their squares, and of their squares about the group's mean."""

MOST_BLOCKS = FEW_GROUPS - 1
"""More prompt groups than this are summed in so many blocks, each of which is left out in turn."""


class HeldOutErrors:
    """Sums over the response tokens of the held-out rollouts, group by group, while they are evaluated.

    Args:
        groups: int64 [n], the prompt group of every held-out rollout.
        level: about the mean return, so that sums of squares do not cancel.
    """

    def __init__(self, groups: NDArray[np.int64], level: float) -> None:
        self._keys = np.unique(groups)
        self._level = level
        self._sums = np.zeros((5, len(self._keys)))  # tokens; returns and their squares; errors and their squares

    def add(self, rollouts: Rollouts, values: NDArray[np.float32]) -> None:
        """Add some rollouts with the critic's values of their tokens, float32 [T]."""
        mask = rollouts.response_mask
        group = np.repeat(np.searchsorted(self._keys, rollouts.group), rollouts.lengths)[mask]
        returns = rollouts.returns[mask].astype(np.float64)
        error = returns - values[mask]
        returns -= self._level
        columns = (np.ones(len(error)), returns, returns**2, error, error**2)
        self._sums += np.stack([sums_by_key(column, group, len(self._keys)) for column in columns])

    def blocks(self) -> tuple[Floats, Floats]:
        """float64 [blocks, 4] and [blocks, 3]: tokens and the sums of returns as in `Sums`; those of errors."""
        tokens, *sums = self._sums
        inside = [squares - total**2 / np.maximum(tokens, 1.0) for total, squares in (sums[:2], sums[2:])]
        of_group = np.column_stack([tokens, *sums[:2], inside[0], *sums[2:], inside[1]])
        block = np.arange(len(of_group)) % MOST_BLOCKS
        summed = np.zeros((min(len(of_group), MOST_BLOCKS), of_group.shape[1]))
        np.add.at(summed, block, of_group)
        return summed[:, :4], summed[:, 4:]


def difference_to_start(best_by: str, returns: Floats, errors: Floats, start: Sums) -> dict[str, Any]:
    """The figure of --best-by now less that of step 0, with the 95 % interval of the paired difference.

    Args:
        best_by: explained_variance, explained_variance_within_group, or an error, for which both mean squared errors
            are compared.
        returns, errors: from `HeldOutErrors.blocks`.
        start: the errors of step 0.

    Returns:
        {difference, interval}; a figure that does not exist gives None.
    """
    columns = np.concatenate([returns, errors, np.asarray(start)], axis=1)
    # About the mean of all, as `Resampling.of` has it.
    mean = returns[:, 1].sum() / returns[:, 0].sum()
    shares = returns[:, 2] - 2 * mean * returns[:, 1] + returns[:, 0] * mean**2
    total = float(shares.sum())
    effective = total**2 / float(np.square(shares).sum()) if total > 0.0 else float(len(shares))
    resampling = Resampling(groups=len(columns), resamples=0, seed=0, effective=effective)
    difference = float(_differences(best_by, columns.sum(0, keepdims=True))[0])
    if not np.isfinite(difference):
        return {"difference": None, "interval": None}
    return {
        "difference": difference,
        "interval": resampling.interval(difference, _differences(best_by, resampling.sums(columns))),
    }


def beats_start(best_by: str, minus_start: dict[str, Any]) -> bool:
    """Whether the whole interval of a difference to step 0 is on the better side of 0."""
    interval = minus_start["interval"]
    return interval is not None and all(is_better(best_by, bound, 0.0) for bound in interval)


def _differences(best_by: str, sums: Floats) -> Floats:
    """The figure less that of step 0 from sums [resamples, 10]: float64 [resamples]."""
    tokens, total, squares, inside, *errors = sums.T
    now, start = errors[:3], errors[3:]
    if best_by == "explained_variance_within_group":
        return explained_in_resamples(now[2], inside) - explained_in_resamples(start[2], inside)
    if best_by == "explained_variance":
        varied = squares - total**2 / tokens
        of_now, of_start = (about_mean(part, tokens) for part in (now, start))
        return explained_in_resamples(of_now, varied) - explained_in_resamples(of_start, varied)
    return np.asarray((now[1] - start[1]) / tokens)


def about_mean(errors: Sequence[Floats], tokens: Floats) -> Floats:
    """Sums of squares about the mean, from sums and sums of squares."""
    return np.asarray(errors[1] - errors[0] ** 2 / tokens)
