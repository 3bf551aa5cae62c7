"""Which discount and lambda the stored returns were computed with, by computing them again with candidates."""

from dataclasses import dataclass
from itertools import product

import numpy as np

from critic_train.data.returns import ReturnRecipe
from critic_train.rollouts import Rollouts

GAMMAS = (1.0, 0.999, 0.997, 0.995, 0.99, 0.98, 0.97, 0.95, 0.9, 0.8, 0.5, 0.0)
LAMBDAS = (1.0, 0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.8, 0.7, 0.5, 0.2, 0.0)
"""The simplest first: where several pairs give the same returns, the first of them is named."""

TOLERANCE = 1e-3
"""Largest error of a match, relative to the size of the returns: bf16 columns pass (2^-8 of each number, averaged),
another lambda does not."""

REFINEMENTS = 40
DECIMALS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ReturnsMatch:
    """What the stored returns were compared with.

    Attributes:
        gamma, lam: the pair that comes closest; lam is 1 where there are no values to try others with.
        error: root mean square difference, relative to the root mean square of the returns.
        bootstrapped: whether truncated rollouts go on with a value behind their last token.
        matches: whether the error is small enough to call it a match.
    """

    gamma: float
    lam: float
    error: float
    bootstrapped: bool
    matches: bool

    def as_dict(self) -> dict[str, float | bool]:
        """For the result of `check`; JSON-able."""
        return {
            "gamma": self.gamma,
            "lam": self.lam,
            "error": self.error,
            "bootstrapped": self.bootstrapped,
            "found": self.matches,
        }


def match_returns(rollouts: Rollouts) -> ReturnsMatch | None:
    """Find (gamma, lambda) from rewards, values and returns.

    A grid of the usual values comes first, then a search around the best of it, so that an unusual pair is found as
    well. Values are not needed for lambda 1.

    Args:
        rollouts: a sample, with rewards and returns; tokens off the mask are skipped.

    Returns:
        The closest pair; None without rewards or returns.
    """
    if rollouts.rewards is None or not rollouts.response_mask.any():
        return None
    trial = _Trial(rollouts)
    best = min(trial.grid(), key=lambda match: (round(match.error, 9), -match.lam, -match.gamma))
    return best if best.matches else trial.refined(best)


class _Trial:
    """Makes returns again and says how far off they are."""

    def __init__(self, rollouts: Rollouts) -> None:
        self._rollouts = rollouts
        mask = rollouts.response_mask
        self._target = rollouts.returns[mask].astype(np.float64)
        self._size = float(np.sqrt(np.mean(self._target**2))) or 1.0
        self._has_values = rollouts.values is not None
        cut = rollouts.truncated
        self._may_bootstrap = cut is not None and bool(cut.any()) and self._has_values

    def grid(self) -> list[ReturnsMatch]:
        """Every pair of the grid, with and without a bootstrap where there is something to bootstrap."""
        lambdas = LAMBDAS if self._has_values else (1.0,)
        modes = (False, True) if self._may_bootstrap else (False,)
        return [self.tried(gamma, lam, mode) for mode, gamma, lam in product(modes, GAMMAS, lambdas)]

    def tried(self, gamma: float, lam: float, bootstrapped: bool) -> ReturnsMatch:
        """How far the returns made with a pair are from those stored."""
        recipe = ReturnRecipe(kind="gae", gamma=gamma, lam=lam, truncated="bootstrap" if bootstrapped else "terminal")
        made = recipe.returns(self._rollouts, self._rollouts.values)[self._rollouts.response_mask].astype(np.float64)
        error = float(np.sqrt(np.mean((made - self._target) ** 2))) / self._size
        return ReturnsMatch(gamma=gamma, lam=lam, error=error, bootstrapped=bootstrapped, matches=error <= TOLERANCE)

    def refined(self, best: ReturnsMatch) -> ReturnsMatch:
        """A pattern search around a pair of the grid, its result rounded to the decimals that people write."""
        step = 0.05
        for _ in range(REFINEMENTS):
            moves = [(step, 0.0), (-step, 0.0), (0.0, step), (0.0, -step), (step, -step), (-step, step)]
            around = [
                self.tried(best.gamma + dg, best.lam + dl, best.bootstrapped)
                for dg, dl in moves
                if 0.0 <= best.gamma + dg <= 1.0 and 0.0 <= best.lam + dl <= 1.0 and (dl == 0.0 or self._has_values)
            ]
            better = min(around, key=lambda match: match.error, default=best)
            if better.error < best.error:
                best = better
            else:
                step /= 2
            if step < 10.0 ** -(DECIMALS + 1):
                break
        written = self.tried(round(best.gamma, DECIMALS), round(best.lam, DECIMALS), best.bootstrapped)
        return written if written.matches or written.error <= best.error else best
