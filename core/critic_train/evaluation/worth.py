"""What a critic is worth in rollouts: the variance of advantages against the number of rollouts a prompt.

GRPO's baseline, the mean of the prompt's k - 1 other rollouts, gets better with k and costs k rollouts; a critic does
not. Where i's outcome is R_i and S are k - 1 of the n - 1 others of its prompt, on average over all such S

    E_S (R_i - mean_S R)^2 = (R_i - mean_others R)^2 + s_i^2 (1 / (k - 1) - 1 / (n - 1))

with s_i^2 the variance of the others' outcomes, over n - 2 (sampling without replacement: Cochran 1977, chapter 2). So
every subset is counted, and none is drawn. Summed up, the variance against k is a + b / (k - 1), which is unbiased
beyond n as well. The fused baseline's error is the critic's less w times the mean of the others' residuals, for which
the same holds, with the weights of k - 1 others (`data.mixture`).

A critic alone is worth the N at which a + b / (N - 1) is the variance of its own advantages: N = 1 + b / (Var - a). All
advantages are at lambda 1, the sum of the rewards to come less the baseline, and about their mean; prompts with one
rollout are left out.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from critic_train.data.mixture import FusedWeights, Residuals
from critic_train.evaluation.advantages import on_a_line
from critic_train.evaluation.moments import Floats, Integers, Moments, sums_by_key
from critic_train.evaluation.resampling import Resampling

SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
MOST = 1024
"""Stands for a critic that no group, however large, does as well as."""


NO_WORTH: dict[str, Any] = {
    "rollouts_a_prompt": None,
    "rollouts_with_fused": None,
    "critic": {
        "advantage_variance": None,
        "advantage_variance_interval": None,
        "explained_variance": None,
        "explained_variance_interval": None,
    },
    "by_rollouts": [],
}
"""What a critic is worth where no prompt has several rollouts."""


def variance_of_others(x: Floats, group: Integers, size: Integers) -> Floats:
    """Variance of x among the other rollouts of the prompt, float64 [m]; of all of it where there is one other.

    Args:
        x: float64 [m].
        group: int64 [m], prompt group of each.
        size: int64 [groups], rollouts of each.
    """
    mean = sums_by_key(x, group, len(size)) / size
    apart = np.square(x - mean[group])
    n = size[group].astype(np.float64)
    squares = sums_by_key(apart, group, len(size))[group]
    # Without x the sum of squares about the mean is smaller by (x - mean)^2 n / (n - 1).
    without = (squares - apart * n / np.maximum(n - 1, 1)) / np.maximum(n - 2, 1)
    return np.maximum(np.where(n > 2, without, squares / np.maximum(n - 1, 1)), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorthOutcomes:
    """What the worth of every critic is measured against, of the prompts with two rollouts or more.

    Attributes:
        group: int64 [m], prompt group of each rollout.
        size: int64 [groups].
        sums: moments of each rollout's rewards to come.
        outcomes: float64 [m].
    """

    group: Integers
    size: Integers
    sums: Moments
    outcomes: Floats

    @property
    def typical(self) -> int:
        """The median size of the groups with two rollouts or more; 0 where there is none."""
        several = self.size[self.size > 1]
        return int(np.median(several)) if len(several) else 0

    @property
    def sizes(self) -> list[int]:
        """The k that are tabulated, up to the typical size of a group."""
        return sorted({k for k in SIZES if k < self.typical} | ({self.typical} if self.typical else set()))

    def weight(self) -> Floats:
        """float64 [m], response tokens; 0 for a rollout that is alone."""
        return np.where(self.size[self.group] > 1, self.sums.count, 0).astype(np.float64)

    def columns(self) -> Floats:
        """float64 [groups, 6]: tokens; moments of the rewards to come; first moment, a and b of GRPO's advantages.

        The rewards to come are taken about their mean, so that the second moment does not cancel.
        """
        weight, groups = self.weight(), len(self.size)
        level = float(np.average(self.sums.mean, weights=weight)) if weight.any() else 0.0
        others = _mean_of_others(self.outcomes, self.group, self.size)
        spread = variance_of_others(self.outcomes, self.group, self.size)
        advantage = self.outcomes - others
        peers = np.maximum(self.size[self.group] - 1, 1)
        apart = self.sums.mean - level
        inside = np.where(weight > 0, self.sums.squares, 0.0)
        columns = (
            weight,
            weight * apart,
            inside + weight * apart**2,
            weight * advantage,
            weight * (advantage**2 - spread / peers),
            weight * spread,
        )
        return np.stack([sums_by_key(x, self.group, groups) for x in columns], axis=1)

    def critic_columns(self, values: Moments, apart: Moments, residuals: Residuals, weights: FusedWeights) -> Floats:
        """First and second moments of the advantages with one critic, and with it fused at each of `sizes`.

        Args:
            values, apart: moments of each rollout's values, and of its rewards to come less these.
            residuals: of the critic.
            weights: from these.

        Returns:
            float64 [groups, 2 + 2 * sizes].
        """
        weight = self.weight()
        columns = self._moments(apart.mean, apart.squares, weight)
        others = _mean_of_others(residuals.residual, self.group, self.size)
        spread = variance_of_others(residuals.residual, self.group, self.size)
        peers = np.maximum(self.size[self.group] - 1, 1)
        for k in self.sizes:
            prompt_weight, scale = (x[self.group] for x in weights.at(k - 1))
            # All groups have k rollouts here, and so the same weight.
            offset = (1.0 - scale) * residuals.first_value + prompt_weight * others
            errors = on_a_line(self.sums, values, apart, offset, scale)
            sampled = prompt_weight**2 * spread * (1 / (k - 1) - 1 / peers)
            columns += self._moments(errors.mean, errors.squares + weight * sampled, weight)
        return np.stack(columns, axis=1)

    def _moments(self, mean: Floats, squares: Floats, weight: Floats) -> list[Floats]:
        level = float(np.average(mean, weights=weight)) if weight.any() else 0.0
        apart, inside = mean - level, np.where(weight > 0, squares, 0.0)
        groups = len(self.size)
        return [sums_by_key(x, self.group, groups) for x in (weight * apart, inside + weight * apart**2)]


def _mean_of_others(x: Floats, group: Integers, size: Integers) -> Floats:
    """Mean of x over the other rollouts of the prompt; 0 where there is none."""
    level = float(x.mean()) if len(x) else 0.0
    total = sums_by_key(x - level, group, len(size))[group]
    peers = size[group] - 1
    return np.where(peers > 0, (total - (x - level)) / np.maximum(peers, 1) + level, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """Sums of a critic's worth over the groups, and over those of each resample: float64 [1 + resamples] each.

    Attributes:
        sizes: the k that are tabulated.
        own: variance of the rewards to come.
        floor, fall: a and b of the variance of GRPO's advantages.
        critic: variance of the advantages with the critic alone.
        fused: the same with it fused, a row for each k.
        resampling: of the groups.
    """

    sizes: list[int]
    own: Floats
    floor: Floats
    fall: Floats
    critic: Floats
    fused: list[Floats]
    resampling: Resampling

    @classmethod
    def of(cls, sizes: list[int], shared: Floats, columns: Floats, resampling: Resampling) -> "Worth | None":
        """From the sums of `WorthOutcomes.columns` and `critic_columns`, float64 [1 + resamples, k] each."""
        tokens = shared[:, 0]
        if not sizes or not (tokens > 0).all():
            return None

        def variance(first: Floats, second: Floats) -> Floats:
            return np.maximum(second / tokens - (first / tokens) ** 2, 0.0)

        return cls(
            sizes=sizes,
            own=variance(shared[:, 1], shared[:, 2]),
            floor=shared[:, 4] / tokens - (shared[:, 3] / tokens) ** 2,
            fall=shared[:, 5] / tokens,
            critic=variance(columns[:, 0], columns[:, 1]),
            fused=[variance(columns[:, 2 + 2 * j], columns[:, 3 + 2 * j]) for j in range(len(sizes))],
            resampling=resampling,
        )

    def group_mean(self, rollouts: int) -> Floats:
        """Variance of GRPO's advantages with so many rollouts a prompt."""
        return self.floor + self.fall / (rollouts - 1)

    def inverse(self, variance: Floats) -> Floats:
        """1 / (N - 1) for the group of N rollouts whose mean leaves this variance; 0 or less where no group does."""
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse: Floats = (variance - self.floor) / self.fall
        return inverse

    def table(self) -> list[dict[str, Any]]:
        """A row for each k: the variance of advantages, and the share of the rewards' that it takes away.

        Returns:
            {rollouts, group_mean, fused}, the latter two {advantage_variance, explained_variance} with intervals;
            `fused` has `equals_group_of`, N as of the critic alone.
        """
        rows = []
        for k, fused in zip(self.sizes, self.fused, strict=True):
            equal = {"equals_group_of": rollouts_of(float(self.inverse(fused)[0]))}
            group_mean = self._figures(self.group_mean(k))
            rows.append({"rollouts": k, "group_mean": group_mean, "fused": self._figures(fused) | equal})
        return rows

    def figures(self) -> dict[str, Any]:
        """The worth of a critic as JSON has it: see `evaluation.judge`."""
        typical = self.sizes[-1]
        least = float(self.group_mean(typical)[0])
        enough = [k for k, fused in zip(self.sizes, self.fused, strict=True) if float(fused[0]) <= least]
        return {
            "rollouts_a_prompt": typical,
            "rollouts_with_fused": 1 if float(self.critic[0]) <= least else min(enough, default=None),
            "critic": self._figures(self.critic),
            "by_rollouts": self.table(),
        }

    def _figures(self, variance: Floats) -> dict[str, Any]:
        figures: dict[str, Any] = {"advantage_variance": float(variance[0]), "advantage_variance_interval": None}
        figures["advantage_variance_interval"] = self.resampling.interval(float(variance[0]), variance[1:])
        figures |= {"explained_variance": None, "explained_variance_interval": None}
        if self.own[0] > 0.0:
            with np.errstate(divide="ignore", invalid="ignore"):
                share = 1.0 - variance / self.own
            figures["explained_variance"] = float(share[0])
            figures["explained_variance_interval"] = self.resampling.interval(float(share[0]), share[1:], ratio=True)
        return figures


def rollouts_of(inverse: float) -> float | None:
    """N of 1 / (N - 1), at most MOST; None for NaN."""
    if np.isnan(inverse):
        return None
    return float(min(MOST, 1.0 + 1.0 / inverse)) if inverse > 0.0 else float(MOST)


def share_columns(outcomes: Floats, group: Integers, size: Integers) -> Floats:
    """The sums of each group that `between_prompt_share` needs: float64 [groups, 6].

    Args:
        outcomes: float64 [m], one a rollout.
        group: int64 [m], prompt group of each.
        size: int64 [groups], rollouts of each.
    """
    apart = outcomes - (outcomes.mean() if len(outcomes) else 0.0)
    total = sums_by_key(apart, group, len(size))
    inside = sums_by_key(np.square(apart - (total / np.maximum(size, 1))[group]), group, len(size))
    n = size.astype(np.float64)
    return np.stack([np.ones(len(size)), n, n * n, total, total * total / np.maximum(n, 1), inside], axis=1)


def between_prompt_share(sums: Floats) -> Floats:
    """The share of the outcomes' variance that lies between prompts: tau^2 / (tau^2 + s^2).

    One-way analysis of variance (Searle, Casella and McCulloch 1992, chapter 3): the most that a baseline which knows
    the prompt alone can explain. Below 0 where groups differ less than by chance. NaN where it cannot be told: no
    prompt has two rollouts, or nothing varies.

    Args:
        sums: float64 [k, 6], sums of `share_columns` over the groups, k times.

    Returns:
        float64 [k].
    """
    groups, rollouts, squares, total, products, inside = sums.T
    with np.errstate(divide="ignore", invalid="ignore"):
        within = inside / (rollouts - groups)
        effective = (rollouts - squares / rollouts) / (groups - 1)
        between = ((products - total**2 / rollouts) / (groups - 1) - within) / effective
        return np.asarray(np.where(rollouts > groups, between / (between + within), np.nan))
