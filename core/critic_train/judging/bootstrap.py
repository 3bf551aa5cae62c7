"""Confidence intervals by resampling prompt groups.

Rollouts of one prompt resemble each other and tokens of one rollout share their return, so the prompt group
is the unit that was drawn independently, and the unit that is resampled (the cluster bootstrap; percentile
intervals, Efron and Tibshirani 1993, chapter 13).
"""

from collections.abc import Iterator

import numpy as np

from critic_train.judging.moments import Floats, Integers

CHUNK_NUMBERS = 2**20
LEVEL = 0.95


def draws(groups: int, resamples: int, seed: int) -> Iterator[Integers]:
    """How often each group is drawn, resample by resample, in chunks.

    Args:
        groups: number of groups, at least 1; each resample draws as many with replacement.
        resamples: number of resamples in all.
        seed: the same seed gives the same draws.

    Yields:
        int64 [chunk, groups]; each row sums to `groups`.
    """
    generator = np.random.default_rng(seed)
    chunk = max(1, CHUNK_NUMBERS // groups)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = generator.integers(0, groups, size=(rows, groups), dtype=np.int64)
        drawn += np.arange(rows, dtype=np.int64)[:, None] * groups
        yield np.bincount(drawn.ravel(), minlength=rows * groups).reshape(rows, groups)


def resampled_sums(columns: Floats, resamples: int, seed: int) -> Floats:
    """Sums over the groups of each resample.

    Args:
        columns: float64 [groups, k], sums of each group, in an order that does not depend on arrival.
        resamples: number of resamples.
        seed: of the draws.

    Returns:
        float64 [resamples, k].
    """
    parts = [counts.astype(np.float64) @ columns for counts in draws(len(columns), resamples, seed)]
    return np.concatenate(parts) if parts else np.empty((0, columns.shape[1]))


def percentile_interval(figures: Floats, level: float = LEVEL) -> list[float] | None:
    """[low, high] of the middle `level` of the resampled figures.

    NaN marks resamples in which the figure does not exist (no variance was drawn): they are left out. None
    where no resample has a figure.
    """
    exist = figures[np.isfinite(figures)]
    if not len(exist):
        return None
    low, high = np.quantile(exist, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]
