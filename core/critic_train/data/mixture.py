"""The fused baseline: a critic's values, corrected by how the prompt's other rollouts ended.

PPO's baseline is a critic V, GRPO's the mean outcome of the prompt's other rollouts; each knows what the other does
not. For rollout i of a prompt with k other rollouts j, outcomes R and residuals e_j = R_j - V_j(s_0) at the prompt's
end:

    F_it = V_i(s_0) + lambda * (V_i(s_t) - V_i(s_0)) + w * (mean_j e_j - mu) + w_mean * mu

The third part shrinks the others' residuals, as V_0.5 does (arXiv 2603.10848): a prior worth s^2 / tau^2 rollouts,
beside k rollouts that are seen. With lambda 1, and a movement V(s_t) - V(s_0) that knows nothing of other rollouts, it
is

    w = k tau^2 / (k tau^2 + s^2)

with tau^2 and s^2 the variance of the residuals between and within prompts, by one-way analysis of variance (Searle,
Casella and McCulloch 1992, chapter 3, with their n_0 for groups of unequal size), and mu their mean. The second part is
the sign test of EVPO (arXiv 2604.19485) by degrees: a movement that only adds noise gets lambda 0, which leaves the
prompt's mean, and one that explains the return gets 1, which leaves the critic. Both follow together from least
squares: y_it = M_it - V_i(s_0), M the sum of the rewards to come, on the movement d_it and the others' mean residual,

    [tau^2 + s^2 / k   c] [w     ]   [kappa]       kappa, c: covariance between prompts of a rollout's mean y and mean d
    [c                 q] [lambda] = [p    ]       with another rollout's e;  q = Var d,  p = Cov(d, y), over tokens

where each rollout counts once. V alone (w 0, lambda 1) and the prompt's mean (w 1, lambda 0) are points of this plane,
so that F is in expectation no worse than the better of them. lambda is kept in [0, 1]; then w is, for that lambda, the
covariance kappa - lambda c over tau^2 + s^2 / k.

The covariance counts only where it is more than two and a half standard errors (of one between prompts which is 0)
above 0: to a critic that is right about the prompt within the error no noise is added. w_mean is w averaged over
rollouts, so that in groups of equal size the correction is w times the others' mean residual, and groups of another
size, with another w, are at the same level. A level of its own would cost more than it mends: a constant costs an
advantage no variance, one that is estimated on other prompts does.

Every figure is taken from the *other prompts* alone, and the residuals from the other rollouts: F_it depends on nothing
that rollout i did from t on, and is a valid baseline.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

SIGNIFICANT = 2.5
"""Standard errors that a covariance between prompts has to be away from 0."""
FEWEST_PROMPTS = 3
"""Prompt groups that the weights need: two beside the one that is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Residuals:
    """What the weights are estimated from, of m rollouts, float64 [m] each; means are over a rollout's response tokens.

    Attributes:
        first_value: V(s_0), the value of the first response token.
        residual: e, the outcome less that.
        target: mean of y = M - V(s_0), M the sum of the rewards to come.
        movement: mean of d = V(s_t) - V(s_0).
        movement_square: mean of d^2.
        movement_target: mean of d * y.
    """

    first_value: Floats
    residual: Floats
    target: Floats
    movement: Floats
    movement_square: Floats
    movement_target: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedWeights:
    """The figures of the module's formula for each prompt group, from all other groups: float64 [groups] each.

    Attributes:
        size: int64 [groups], rollouts of each.
        between, within: tau^2 and s^2 of the residuals.
        residual_mean: mu.
        target_between, movement_between: kappa and c.
        movement_variance, movement_covariance: q and p.
        inside: float64 [5, groups], covariances within groups of a rollout's mean y, mean d and e: yy, yd, dd, ye, de.
        error: the standard error of a covariance between groups that is 0, where those within are 1 and 0.
    """

    size: Integers
    between: Floats
    within: Floats
    residual_mean: Floats
    target_between: Floats
    movement_between: Floats
    movement_variance: Floats
    movement_covariance: Floats
    inside: Floats
    error: Floats

    def at(self, others: Integers | int) -> tuple[Floats, Floats]:
        """w and lambda of each group where a rollout sees the residuals of `others` more of its prompt.

        Args:
            others: k, one for all or int64 [groups]; 0 gives w 0.
        """
        k = np.broadcast_to(np.asarray(others, dtype=np.float64), self.size.shape)
        spread = self.between + self.within / np.maximum(k, 1.0)
        seen = (k > 0) & (spread > 0.0)
        inverse = np.where(seen, 1.0 / np.where(seen, spread, 1.0), 0.0)
        c, kappa = self.movement_between, self.target_between
        variance = self.movement_variance - c * c * inverse
        covariance = self.movement_covariance - c * kappa * inverse
        moves = variance > 0.0  # a critic that gives one value to all of a response has nothing to scale
        scale = np.where(moves, np.clip(covariance / np.where(moves, variance, 1.0), 0.0, 1.0), 1.0)
        yy, yd, dd, ye, de = self.inside
        # The variance of a product moment of two normal variables: s_x^2 s_z^2 + s_xz^2.
        squares = (yy - 2 * scale * yd + scale**2 * dd) * self.within + (ye - scale * de) ** 2
        apart = significant(kappa - scale * c, np.maximum(squares, 0.0) * self.error**2)
        return np.clip(apart * inverse, 0.0, 1.0), scale

    def level(self) -> Floats:
        """w_mean * mu of each group, float64 [groups]."""
        mean = np.zeros(len(self.size))
        for size, groups in zip(*np.unique(self.size, return_counts=True), strict=True):
            mean += self.at(size - 1)[0] * (size * groups / self.size.sum())
        return mean * self.residual_mean


def significant(x: Floats, squared_error: Floats) -> Floats:
    """x where it is more than SIGNIFICANT standard errors away from 0, else 0."""
    return np.where(x**2 > SIGNIFICANT**2 * squared_error, x, 0.0)


def fused_weights(residuals: Residuals, group: Integers, groups: int) -> FusedWeights | None:
    """The figures that the fused baseline is made with.

    Args:
        residuals: of m rollouts.
        group: int64 [m], prompt group of each, in 0..groups-1.
        groups: their number, each with a rollout at least.

    Returns:
        None where they cannot be estimated: below FEWEST_PROMPTS prompts, or where leaving one out leaves no prompt
        with two rollouts.
    """
    size = np.bincount(group, minlength=groups)
    if groups < FEWEST_PROMPTS or (len(group) - size <= groups - 1).any():
        return None
    others = _OtherGroups(group, size)
    rest = others.rollouts
    # About the mean of all, so that sums of squares do not cancel where residuals have an offset.
    level = float(residuals.residual.mean())
    e, y = residuals.residual - level, residuals.target - level
    d = residuals.movement
    between, within = others.components(e, e)
    (kappa, within_ye), (c, within_de) = others.components(y, e), others.components(d, e)
    inside = np.stack([*(others.components(*pair)[1] for pair in ((y, y), (y, d), (d, d))), within_ye, within_de])
    mean_y, mean_d = others.sums(y) / rest, others.sums(d) / rest
    # d * y counts y with its level; the mean movement times the level takes it out.
    products = others.sums(residuals.movement_target - level * residuals.movement)
    return FusedWeights(
        size=size,
        between=np.maximum(between, 0.0),
        within=np.maximum(within, 0.0),
        residual_mean=others.sums(e) / rest + level,
        target_between=kappa,
        movement_between=c,
        movement_variance=others.sums(residuals.movement_square) / rest - mean_d**2,
        movement_covariance=products / rest - mean_y * mean_d,
        inside=inside,
        error=np.sqrt(1 / (groups - 2) + 1 / (rest - (groups - 1))) / others.effective_size,
    )


class _OtherGroups:
    """Sums and covariances over all groups but one, for each group.

    Attributes:
        rollouts: int64 [groups], rollouts of the other groups.
        effective_size: float64 [groups], n_0, the size of equal groups that tell as much.
    """

    def __init__(self, group: Integers, size: Integers) -> None:
        """Args:
        group: int64 [m], group of each rollout.
        size: int64 [groups], rollouts of each.
        """
        self._group, self._size = group, size
        self.rollouts = len(group) - size
        squares = size.astype(np.float64) ** 2
        self.effective_size = (self.rollouts - (squares.sum() - squares) / self.rollouts) / (len(size) - 2)

    def sums(self, x: Floats) -> Floats:
        """Sums of x [m] over the rollouts of the other groups."""
        own = np.bincount(self._group, weights=x, minlength=len(self._size))
        return np.asarray(own.sum() - own)

    def components(self, x: Floats, z: Floats) -> tuple[Floats, Floats]:
        """Covariance of x and z [m] between and within the other groups."""
        group, size, groups = self._group, self._size, len(self._size)
        sum_x, sum_z = (np.bincount(group, weights=v, minlength=groups) for v in (x, z))
        inside = np.bincount(group, weights=(x - (sum_x / size)[group]) * (z - (sum_z / size)[group]))
        product = sum_x * sum_z / size
        apart = product.sum() - product - (sum_x.sum() - sum_x) * (sum_z.sum() - sum_z) / self.rollouts
        within = (inside.sum() - inside) / (self.rollouts - (groups - 1))
        return (apart / (groups - 2) - within) / self.effective_size, within


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedBaseline:
    """F as a line in V, one for each rollout: F_it = offset_i + scale_i * V_it.

    Attributes:
        offset, scale: float64 [m].
        prompt_weight: w, float64 [groups].
        response_weight: lambda, float64 [groups].
    """

    offset: Floats
    scale: Floats
    prompt_weight: Floats
    response_weight: Floats


def fused_baseline(residuals: Residuals, group: Integers, weights: FusedWeights) -> FusedBaseline:
    """The fused baseline of every rollout, from the residuals of the others of its prompt.

    Args:
        residuals: of m rollouts.
        group: int64 [m], prompt group of each.
        weights: from `fused_weights` of the same.
    """
    prompt_weight, scale = weights.at(weights.size - 1)
    total = np.bincount(group, weights=residuals.residual, minlength=len(weights.size))
    peers = np.maximum(weights.size - 1, 1)
    correction = (total[group] - residuals.residual) / peers[group] - weights.residual_mean[group]
    return FusedBaseline(
        offset=(1.0 - scale[group]) * residuals.first_value
        + prompt_weight[group] * correction
        + weights.level()[group],
        scale=scale[group],
        prompt_weight=prompt_weight,
        response_weight=scale,
    )
