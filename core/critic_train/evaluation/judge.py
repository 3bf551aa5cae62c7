"""Evaluation of critics: rollouts and values are taken in batch by batch, all figures come out at the end.

Metrics of a prediction V of returns G, over response tokens, each token with the same weight:
    explained_variance: 1 - Var(G - V) / Var(G). Above 0, V lowers the variance of the advantage, below
        it raises it (EVPO, arXiv 2604.19485).
    explained_variance_within_group: the same with all variances taken about the prompt group's own
        mean and pooled: 1 - sum_g SS_g(G - V) / sum_g SS_g(G). What V knows beyond the prompt.
    *_interval: [low, high], 95 % percentile bootstrap over prompt groups; None below two groups.
    mse, mae, bias: means of (V - G)^2, |V - G| and V - G.
    pearson, spearman: correlations of V and G; ties get average ranks. token_columns.RankCorrelation
        says how exact the latter is above a million tokens.
    value_loss: 0.5 * mean of max((V - G)^2, (clip(V, V_old - eps, V_old + eps) - G)^2), as in verl;
        0.5 * mse when the clip is off; None without stored values.
    clipfrac: share of tokens whose clipped loss is strictly the larger; None without a clip.
    saturation: share of tokens whose gradient the clip has zeroed: clipped loss the larger and
        |V - V_old| > eps; None without a clip.
    explained_variance_minus: baseline -> {difference, interval}, paired by prompt group (critics and
        stored values only).
    calibration: tokens by quantiles of the value, up to ten bins, rising: {from, to, tokens, rollouts, mean_value,
        mean_return, interval}; the interval is the mean return's. Equal values share a bin.
    expected_calibration_error: mean of |mean value - mean return| over these bins, weighted by tokens.
    auc: the chance that a right rollout's value, taken on average over its response, lies above a wrong one's; ties
        count half. Right is the larger of two outcomes; an outcome is the sum of a rollout's rewards, without rewards
        the return of its last response token, which is the reward given there whatever gamma and lambda were. None
        where there are not two outcomes.
    auc_within_group: the same over the pairs of rollouts of one prompt.
    auc_by_position: list of {from, to, pairs, auc_within_group, interval}, the value taken on average over this part
        of the response.
    tells_apart_from: the share of the response from which on all of these intervals lie above one half; None where
        the last one does not.
    advantage_variance: variance of the advantages that the prediction gives: GAE's (Schulman et al. 2016), and of
        group_mean GRPO's, the outcome less the mean of the others of its prompt.
    variance_reduction: 1 - advantage_variance / that of group_mean: how much less variance the policy's gradient has.
    monte_carlo: {explained_variance, explained_variance_within_group, their intervals, mse, bias} against Monte-Carlo
        returns (the sums of the rewards to come, discounted by gamma) in place of G. A bootstrapped G is close to the
        values it was made of, and makes a critic trained on it look better than it is;
        explained_variance_excess in it is {difference, interval}, explained variance against G less that. None
        where not every rollout has rewards.
    value_histogram: {edges, counts, below, above}; `below` and `above` count the tokens beyond the edges, which
        are those of the verdict's return_histogram.
    by_position: list of {from, to, tokens, explained_variance, mse, bias, mean_value, mean_return}.
    by_length: rollouts by quantiles of their response tokens, up to five bins, short to long: {from, to, rollouts,
        tokens, explained_variance, mse, bias}.
    groups: "best" and "worst" -> up to five prompt groups by mse: {uid, row, rollouts, tokens, mse, mean_value,
        mean_return}; `row` is the row number of the first rollout in the data set.
    by: column -> value -> {tokens, rollouts, explained_variance, explained_variance_within_group, mse,
        bias, auc_within_group}; what is right follows from the outcomes of these rollouts alone.
calibration to value_histogram and groups are for critics and stored values only, as is auc_within_group in by;
group_mean has an advantage_variance too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from critic_train.evaluation.accumulate import EvalAccumulator
from critic_train.evaluation.advantages import AdvantageRecipe
from critic_train.evaluation.verdict import JudgeOptions, UidLookup, give_verdict
from critic_train.rollouts import Rollouts


class Judge:
    """Judges critics and baselines on the same response tokens.

    Memory is flat in the number of tokens: sums per rollout (about 60 bytes, and 16 for each prediction), and 4 bytes a
    response token for the returns, the rewards, the stored values and each critic in unlinked temporary files. A
    verdict takes about 300 bytes a rollout more while it is made. It does not depend on how the rollouts were batched
    or ordered, rounding aside.
    """

    def __init__(
        self,
        critics: Sequence[str],
        *,
        cliprange_value: float | None = 0.5,
        by: Sequence[str] = (),
        resamples: int = 1000,
        seed: int = 0,
        positions: int = 10,
        uids: UidLookup | None = None,
        advantage: AdvantageRecipe | None = None,
    ) -> None:
        """Args:
        critics: names of the critics; with none, only the baselines are judged.
        cliprange_value: the clip's half-width eps around the stored values; None for plain squared error.
        by: names of label columns; the rollouts with each of their values are also judged apart.
        resamples: bootstrap resamples of the prompt groups.
        seed: of the bootstrap.
        positions: equal parts of a response in `by_position`.
        uids: gives the uids of rows of the data set, for `groups`; without it they are None.
        advantage: how advantages are estimated; gamma 1 and lambda 1 by default.
        """
        if len(set(critics)) != len(critics):
            raise ValueError(f"critics must have different names: {list(critics)}")
        if positions < 1 or resamples < 1:
            raise ValueError("positions and resamples must be at least 1")
        self._options = JudgeOptions(
            critics=tuple(critics),
            cliprange_value=cliprange_value,
            resamples=resamples,
            seed=seed,
            uids=uids,
            advantage=advantage or AdvantageRecipe(),
        )
        self._accumulated = EvalAccumulator(critics, cliprange_value=cliprange_value, by=by, positions=positions)

    def add(self, rollouts: Rollouts, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Take in rollouts, complete, and each critic's values of their tokens.

        A prompt group may be spread over any number of calls. Rollouts without response tokens are left out.
        Where any batch lacks stored values, the verdict has no figures of stored values or the clip.

        Args:
            rollouts: n rollouts, T tokens.
            values: critic name -> float32 [T], aligned like `rollouts.returns`; read under response_mask only.

        Raises:
            ModelError: a critic's value is not finite.
            DataError: a return or stored value is not finite, or a `by` column is missing.
            MachineError: the temporary folder has no room.
            ValueError: a critic is missing or unknown, or its values have the wrong length.
        """
        self._accumulated.add(rollouts, values)

    def verdict(self) -> dict[str, Any]:
        """All figures, ready for JSON; None stands for a figure that does not exist. May be called again.

        Returns:
            rollouts, response_tokens, prompt_groups: counts.
            returns: {mean, std, min, max} over response tokens (std divides by their number).
            return_histogram: {edges, counts, below, above} of the returns; none of them lies beyond.
            advantage: {gamma, lam} of the advantages; lam is None where each rollout has its own.
            critics: name -> metrics.
            baselines: constant (the mean return of these rollouts), stored (V_old, where every batch had it)
                and group_mean (the leave-one-out mean of the prompt group, GRPO's baseline; `lone_rollouts`
                were alone in their group and got the constant) -> metrics.
            differences: "a - b" -> {difference, interval} of explained variance, for each pair of critics, paired by
                prompt group; in it explained_variance_within_group, auc_within_group and mse -> the same of these.
            See the module for the metrics.
        """
        return give_verdict(self._accumulated, self._options)
