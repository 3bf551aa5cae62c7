"""Confidence intervals over prompt groups: the bootstrap, and the jackknife where there are few of them.

Rollouts of one prompt resemble each other and tokens of one rollout share their return, so the prompt group is the unit
that was drawn independently. From FEW_GROUPS on groups are resampled (the cluster bootstrap; percentile intervals,
Efron and Tibshirani 1993, chapter 13). Below, that interval is too narrow: in drawn worlds of 5 to 30 groups the "95 %"
holds the truth in 31 to 93 % of them. There each group is left out once, and the interval is Student's t about the
figure with the jackknife's standard error (Efron and Tibshirani 1993, chapter 11); for a figure 1 - a / b about log(a /
b), which is closer to normal. Its degrees of freedom are (n - 1) / 2 with n the effective number of groups (Kish 1965),
(sum s)^2 / sum s^2 over the groups' shares s of the returns' sum of squares: variances of few groups are themselves
uncertain, and a few groups may decide them. The same worlds are covered in 89 to 100 %, and where n is below 2.5 no
interval is given.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from critic_train.evaluation.moments import Floats, Integers, Moments, pool, pool_all

CHUNK_NUMBERS = 2**20
LEVEL = 0.95
FEW_GROUPS = 200
FEWEST_EFFECTIVE = 2.5
ROUNDING = 1e-12
"""1 - a / b cannot tell a difference below a few thousand roundings from none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resampling:
    """How intervals over some prompt groups are made.

    Attributes:
        groups: their number.
        resamples: of the bootstrap.
        seed: of its draws: the same seed gives the same draws, so that differences pair.
        effective: the effective number of groups, see the module.
    """

    groups: int
    resamples: int
    seed: int
    effective: float

    @classmethod
    def of(cls, group: Integers, groups: int, returns: Moments, resamples: int, seed: int) -> "Resampling":
        """For rollouts with these returns.

        Args:
            group: int64 [m], prompt group of each rollout, from 0.
            groups: their number.
            returns: moments of each rollout's returns, [m].
            resamples: of the bootstrap.
            seed: of its draws.
        """
        if not groups:
            return cls(groups=0, resamples=resamples, seed=seed, effective=0.0)
        grouped, mean = pool(returns, group, groups), float(pool_all(returns).mean[0])
        shares = grouped.squares + grouped.count * (grouped.mean - mean) ** 2
        total = float(shares.sum())
        effective = total**2 / float(np.square(shares).sum()) if total > 0.0 else float(groups)
        return cls(groups=groups, resamples=resamples, seed=seed, effective=effective)

    @property
    def few(self) -> bool:
        """Whether groups are left out in turn rather than drawn."""
        return self.groups < FEW_GROUPS

    def counts(self) -> Iterator[Integers]:
        """How often each group counts, resample by resample, in chunks: int64 [chunk, groups]; none below two groups.

        Each row of the bootstrap sums to the number of groups; the rows of the jackknife leave one group out each.
        """
        if self.groups < 2:
            return
        if self.few:
            yield 1 - np.eye(self.groups, dtype=np.int64)
            return
        yield from draws(self.groups, self.resamples, self.seed)

    def sums(self, columns: Floats) -> Floats:
        """Sums over the groups of each resample.

        Args:
            columns: float64 [groups, k], sums of each group, in an order that does not depend on arrival.

        Returns:
            float64 [resamples, k].
        """
        parts = [counts.astype(np.float64) @ columns for counts in self.counts()]
        return np.concatenate(parts) if parts else np.empty((0, columns.shape[1]))

    def interval(self, figure: float, samples: Floats, *, ratio: bool = False) -> list[float] | None:
        """[low, high], the 95 % interval of a figure; None where there is none that holds what it promises.

        Args:
            figure: of all groups.
            samples: the same in each resample, float64 [resamples]; NaN where it does not exist.
            ratio: whether it is 1 - a / b.
        """
        if not self.few:
            return percentile_interval(samples)
        if not len(samples) or not np.isfinite(samples).all():
            return None
        if ratio and figure < 1.0 and (samples < 1.0).all():
            low, high = self._student(np.log(1.0 - figure), np.log1p(-samples))
            return None if low is None or high is None else [1.0 - float(np.exp(high)), 1.0 - float(np.exp(low))]
        low, high = self._student(figure, samples)
        return None if low is None or high is None else [low, high]

    def _student(self, figure: float, samples: Floats) -> tuple[float | None, float | None]:
        """Student's t about the figure with the jackknife's standard error."""
        spread = float(np.square(samples - samples.mean()).sum())
        error = np.sqrt((self.groups - 1) / self.groups * spread)
        if error <= ROUNDING * max(1.0, abs(figure)):
            return figure, figure  # the same whichever group is left out, as of a constant
        if self.effective < FEWEST_EFFECTIVE:
            return None, None
        half = student_quantile((1 + LEVEL) / 2, max(1.0, (self.effective - 1) / 2)) * error
        return float(figure - half), float(figure + half)


def student_quantile(probability: float, freedom: float) -> float:
    """The number that Student's t stays below with this probability.

    With t = sqrt(freedom) / tan(x) its density is proportional to sin(x)^(freedom - 1), which is summed here.

    Args:
        probability: above one half.
        freedom: degrees of freedom, at least 1, not necessarily whole.
    """
    x = np.linspace(0.0, np.pi / 2, 20_001)
    density = np.sin(x) ** (freedom - 1.0)
    below = np.append(0.0, np.cumsum(density[1:] + density[:-1]))
    angle = np.interp(2.0 * (1.0 - probability), below / below[-1], x)
    return float(np.sqrt(freedom) / np.tan(angle))


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
    group: Integers, quantities: Mapping[str, Moments], resampling: Resampling, further: Floats
) -> tuple[dict[str, ResampledSums], Floats]:
    """Resample prompt groups, with the same draws for every quantity, so that differences pair.

    Args:
        group: int64 [m], prompt group of each rollout, from 0.
        quantities: name -> moments of each rollout's tokens, [m].
        resampling: of the groups.
        further: float64 [groups, k], other sums of each group.

    Returns:
        (name -> its sums, empty below two prompt groups, where nothing can be resampled;
        float64 [resamples, k], the sums of `further`).
    """
    if resampling.groups < 2:
        return {}, np.empty((0, further.shape[1]))
    grouped = [pool(q, group, resampling.groups) for q in quantities.values()]
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
    sums = resampling.sums(np.column_stack([*columns, further]))
    tokens = sums[:, 0]
    resampled = {}
    for index, (name, mean) in enumerate(zip(quantities, means, strict=True)):
        first, second, within = sums[:, 1 + 3 * index : 4 + 3 * index].T
        squares = second - first**2 / tokens
        squares[squares <= ROUNDING * second] = 0.0
        mean_square = squares / tokens + (mean + first / tokens) ** 2
        resampled[name] = ResampledSums(squares=squares, within=within, mean_square=mean_square)
    return resampled, sums[:, len(columns) :]


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
