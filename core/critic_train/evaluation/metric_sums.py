"""The sums over tokens that metrics are functions of, and these functions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from critic_train.evaluation.auc import Discrimination, share_interval
from critic_train.evaluation.moments import Floats, Moments
from critic_train.evaluation.resampling import ROUNDING, ResampledSums, Resampling, explained_in_resamples
from critic_train.evaluation.token_sums import PredictionSums
from critic_train.evaluation.worth import Worth, rollouts_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Sums over some response tokens, of one prediction V of the target G; metrics are functions of them.

    A row of a table (a part of the response, the rollouts with one value of a column) has the moments of the errors
    only, with `discrimination` where the rollouts are those of a column. What is missing is None.

    Attributes:
        tokens: their number.
        error_mean, error_squares: mean of V - G, and the sum of squares about it.
        target_squares: sum of squares of G about its mean.
        error_within, target_within: sums of squares of V - G and of G about the means of their prompt groups.
        resampled: V - G and G in each resample of the prompt groups.
        prediction: absolute errors and co-moments of V and G.
        spearman: rank correlation of V and G.
        cliprange_value: half-width of the clip; None where the loss has no clip.
        has_clip: whether there are stored values to clip around.
        calibration: the rows of the calibration table.
        discrimination: how well V tells rollouts of two outcomes apart.
        advantages: the advantages that V gives as the error, GRPO's as the target.
        has_peers: whether any rollout has others of its prompt group.
        worth: against the number of rollouts a prompt; None where no prompt has several.
    """

    tokens: int
    error_mean: float
    error_squares: float
    target_squares: float
    error_within: float = 0.0
    target_within: float = 0.0
    resampled: tuple[ResampledSums, ResampledSums] | None = None
    prediction: PredictionSums | None = None
    spearman: float | None = None
    cliprange_value: float | None = None
    has_clip: bool = False
    calibration: Sequence[dict[str, Any]] = ()
    discrimination: Discrimination = field(default_factory=Discrimination)
    advantages: "Sums | None" = None
    has_peers: bool = True
    worth: Worth | None = None

    @classmethod
    def of(cls, errors: Moments, target: Moments, index: int = 0, **more: Any) -> "Sums":
        """From the moments of set `index` of the errors and of the target, with other attributes by name."""
        return cls(
            tokens=int(errors.count[index]),
            error_mean=errors.mean[index],
            error_squares=errors.squares[index],
            target_squares=target.squares[index],
            **more,
        )


def explained_variance(error_squares: float, return_squares: float) -> float | None:
    """1 - Var(G - V) / Var(G); None where the returns do not vary.

    The definition of Baselines, CleanRL and verl (`critic/vf_explained_var`), without verl's 1e-5 in the
    denominator. A constant offset of V costs nothing: `bias` shows it.

    Args:
        error_squares: sum of squares of G - V about its mean.
        return_squares: sum of squares of G about its mean.
    """
    if return_squares <= 0.0:
        return None
    figure = 1.0 - error_squares / return_squares
    return 0.0 if abs(figure) < ROUNDING else figure


def mean_square(sums: Sums) -> float:
    """Mean of (V - G)^2."""
    return sums.error_mean**2 + sums.error_squares / sums.tokens


def value_loss(sums: Sums) -> float | None:
    """0.5 * the mean clipped loss; 0.5 * mse without a clip, None where there is nothing to clip around."""
    if sums.cliprange_value is None:
        return 0.5 * mean_square(sums)
    return None if sums.prediction is None or not sums.has_clip else sums.prediction.clip.loss / sums.tokens


def share_clipped(sums: Sums) -> float | None:
    """Share of tokens whose clipped loss is strictly the larger."""
    return None if sums.prediction is None or not sums.has_clip else sums.prediction.clip.clipped / sums.tokens


def share_saturated(sums: Sums) -> float | None:
    """Share of tokens whose gradient the clip has zeroed."""
    return None if sums.prediction is None or not sums.has_clip else sums.prediction.clip.saturated / sums.tokens


def expected_calibration_error(sums: Sums) -> float | None:
    """Mean distance between predicted value and mean return over the bins of the calibration, weighted by tokens.

    Naeini et al. 2015, with bins of equal mass (Nguyen and O'Connor 2015): equal widths leave most bins of a critic
    empty.
    """
    rows = sums.calibration
    tokens = sum(row["tokens"] for row in rows)
    if not tokens:
        return None
    return float(sum(row["tokens"] * abs(row["mean_value"] - row["mean_return"]) for row in rows) / tokens)


def advantage_variance(sums: Sums) -> float | None:
    """Variance of the advantages; None where there are no rollouts."""
    return None if sums.advantages is None else sums.advantages.error_squares / sums.advantages.tokens


def variance_reduction(sums: Sums) -> float | None:
    """1 - the variance of the advantages / that of GRPO's; None where no rollout has others of its prompt group."""
    if sums.advantages is None or not sums.has_peers:
        return None
    return explained_variance(sums.advantages.error_squares, sums.advantages.target_squares)


def worth_in_rollouts(sums: Sums) -> float | None:
    """The rollouts a prompt whose mean leaves the policy the variance that this critic alone leaves it."""
    return None if sums.worth is None else rollouts_of(float(sums.worth.inverse(sums.worth.critic)[0]))


def worth_samples(sums: Sums) -> Floats | None:
    """1 / (N - 1) of the worth N in each resample, float64 [resamples]."""
    if sums.worth is None or len(sums.worth.critic) < 2:
        return None
    return sums.worth.inverse(sums.worth.critic)[1:]


def explained_samples(sums: Sums | None) -> Floats | None:
    """Explained variance in each resample, float64 [resamples]."""
    if sums is None or sums.resampled is None:
        return None
    error, target = sums.resampled
    return explained_in_resamples(error.squares, target.squares)


def explained_within_samples(sums: Sums) -> Floats | None:
    """Explained variance within prompt groups in each resample, float64 [resamples]."""
    if sums.resampled is None:
        return None
    error, target = sums.resampled
    return explained_in_resamples(error.within, target.within)


def ratio_bounds(_: Sums, resampling: Resampling, figure: float, samples: Floats) -> list[float] | None:
    """The interval of a figure 1 - a / b."""
    return resampling.interval(figure, samples, ratio=True)


def share_bounds(_: Sums, resampling: Resampling, figure: float, samples: Floats) -> list[float] | None:
    """The interval of a share of pairs."""
    return share_interval(resampling, figure, samples)


def worth_bounds(sums: Sums, resampling: Resampling, _: float, samples: Floats) -> list[float] | None:
    """The interval of N, whose samples are 1 / (N - 1)."""
    assert sums.worth is not None
    inverse = resampling.interval(float(sums.worth.inverse(sums.worth.critic)[0]), samples)
    ends = [] if inverse is None else [rollouts_of(end) for end in reversed(inverse)]
    return [end for end in ends if end is not None] if None not in ends and ends else None
