"""Confidence intervals by resampling prompt groups.

Rollouts of one prompt resemble each other and tokens of one rollout share their return, so the prompt group
is the unit that was drawn independently, and the unit that is resampled (the cluster bootstrap; percentile
intervals, Efron and Tibshirani 1993, chapter 13).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from critic_train.evaluation.moments import Floats, Integers, Moments, pool, pool_all

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


ROUNDING = 1e-12
"""1 - a / b cannot tell a difference below a few thousand roundings from none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResampledSums:
    """Sums of one quantity over the response tokens of each resample, float64 [resamples] each.

    Attributes:
        squares: sum of squares about the resample's own mean.
        within: sum of squares about the means of the prompt groups.
        mean_square: mean of the squares.
    """

    squares: Floats
    within: Floats
    mean_square: Floats


def resample(
    group: Integers, groups: int, quantities: Mapping[str, Moments], resamples: int, seed: int
) -> dict[str, ResampledSums]:
    """Bootstrap over prompt groups, with the same draws for every quantity, so that differences pair.

    Args:
        group: int64 [m], prompt group of each rollout, from 0.
        groups: their number.
        quantities: name -> moments of each rollout's tokens, [m].
        resamples: number of resamples.
        seed: of the draws.

    Returns:
        Name -> its sums; empty below two prompt groups, where nothing can be resampled.
    """
    if groups < 2:
        return {}
    grouped = [pool(q, group, groups) for q in quantities.values()]
    columns = [grouped[0].count.astype(np.float64)]
    means = [float(pool_all(part).mean[0]) for part in grouped]
    for part, mean in zip(grouped, means, strict=True):
        # About the mean over all, so that the resampled variance does not cancel.
        distance = part.mean - mean
        columns += [
            part.count * distance,
            part.squares + part.count * distance**2,
            part.squares,
        ]
    sums = resampled_sums(np.stack(columns, axis=1), resamples, seed)
    tokens = sums[:, 0]
    resampled = {}
    for index, (name, mean) in enumerate(zip(quantities, means, strict=True)):
        first, second, within = sums[:, 1 + 3 * index : 4 + 3 * index].T
        squares = second - first**2 / tokens
        squares[squares <= ROUNDING * second] = 0.0
        mean_square = squares / tokens + (mean + first / tokens) ** 2
        resampled[name] = ResampledSums(squares=squares, within=within, mean_square=mean_square)
    return resampled


def explained_in_resamples(error: Floats, target: Floats) -> Floats:
    """1 - error / target in each resample; NaN where the target does not vary.

    Args:
        error, target: float64 [resamples], sums of squares.
    """
    figures = np.full(len(error), np.nan)
    varied = target > 0.0
    figures[varied] = 1.0 - error[varied] / target[varied]
    figures[np.abs(figures) < ROUNDING] = 0.0
    return figures
