"""What the resamples of the prompt groups say of variances: the same draws for every quantity, so differences pair."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from critic_train.judging.bootstrap import resampled_sums
from critic_train.judging.moments import Floats, Integers, Moments, pool, pool_all

# 1 - a / b cannot tell a difference below a few thousand roundings from none.
ROUNDING = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Resampled:
    """Sums over the response tokens of each resample, float64 [resamples] for each quantity; empty without resamples.

    Attributes:
        squares: sum of squares about the resample's own mean.
        within: sum of squares about the means of the prompt groups.
        mean_square: mean of the squares.
    """

    squares: dict[str, Floats]
    within: dict[str, Floats]
    mean_square: dict[str, Floats]

    def explained(self, error: str, target: str) -> Floats | None:
        """1 - SS(error) / SS(target) in each resample; NaN where the target does not vary, None without resamples."""
        return _explained(self.squares, error, target)

    def explained_within(self, error: str, target: str) -> Floats | None:
        """The same within prompt groups."""
        return _explained(self.within, error, target)


def resample(group: Integers, groups: int, quantities: Mapping[str, Moments], resamples: int, seed: int) -> Resampled:
    """Bootstrap over prompt groups.

    Args:
        group: int64 [m], prompt group of each rollout, from 0; below two prompt groups nothing can be resampled.
        groups: their number.
        quantities: name -> moments of each rollout's tokens, [m].
        resamples: number of resamples.
        seed: of the draws.
    """
    if groups < 2:
        return Resampled(squares={}, within={}, mean_square={})
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
    found = Resampled(squares={}, within={}, mean_square={})
    for index, (name, mean) in enumerate(zip(quantities, means, strict=True)):
        first, second, within = sums[:, 1 + 3 * index : 4 + 3 * index].T
        squares = second - first**2 / tokens
        squares[squares <= ROUNDING * second] = 0.0
        found.squares[name] = squares
        found.within[name] = within
        found.mean_square[name] = squares / tokens + (mean + first / tokens) ** 2
    return found


def _explained(sums: dict[str, Floats], error: str, target: str) -> Floats | None:
    if error not in sums:
        return None
    figures = np.full(len(sums[error]), np.nan)
    varied = sums[target] > 0.0
    figures[varied] = 1.0 - sums[error][varied] / sums[target][varied]
    figures[np.abs(figures) < ROUNDING] = 0.0
    return figures
