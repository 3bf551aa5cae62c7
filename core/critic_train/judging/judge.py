"""The judge: takes in rollouts and critics' values batch by batch, gives the verdict at the end.

Metrics of a prediction V of returns G, over response tokens, each token with the same weight:
    explained_variance: 1 - Var(G - V) / Var(G). Above 0, V lowers the variance of the advantage, below
        it raises it (EVPO, arXiv 2604.19485).
    explained_variance_within_group: the same with all variances taken about the prompt group's own
        mean and pooled: 1 - sum_g SS_g(G - V) / sum_g SS_g(G). What V knows beyond the prompt.
    *_interval: [low, high], 95 % percentile bootstrap over prompt groups; None below two groups.
    mse, mae, bias: means of (V - G)^2, |V - G| and V - G.
    pearson, spearman: correlations of V and G; ties get average ranks. ranks.RankCorrelation says how
        exact the latter is above 4 million tokens.
    value_loss: 0.5 * mean of max((V - G)^2, (clip(V, V_old - eps, V_old + eps) - G)^2), as in verl;
        0.5 * mse when the clip is off; None without stored values.
    clipfrac: share of tokens whose clipped loss is strictly the larger; None without a clip.
    saturation: share of tokens whose gradient the clip has zeroed: clipped loss the larger and
        |V - V_old| > eps; None without a clip.
    explained_variance_minus: baseline -> {difference, interval}, paired by prompt group (critics and
        stored values only).
    by_position: list of {from, to, tokens, explained_variance, mse, bias, mean_value, mean_return}.
    by: column -> value -> {tokens, rollouts, explained_variance, explained_variance_within_group, mse,
        bias}.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from critic_train.judging.baselines import leave_one_out
from critic_train.judging.evidence import CRITIC, STORED, Evidence
from critic_train.judging.metrics import difference, figures, resample
from critic_train.judging.moments import Moments, pool_all
from critic_train.judging.statistics import PredictionSums
from critic_train.rollouts import Rollouts

CONSTANT, GROUP_MEAN = "constant", "group_mean"
# As shown: figures of the whole first, tables last.
_TABLES = ("by_position", "by")


def without_tables(metrics: dict[str, Any]) -> dict[str, Any]:
    """The single figures of a critic's or a baseline's metrics."""
    return {name: figure for name, figure in metrics.items() if name not in _TABLES}


class Judge:
    """Judges critics and baselines on the same response tokens.

    Memory is flat in the number of tokens: sums per rollout (about 40 bytes, and 16 for each prediction),
    and 4 bytes a response token for the returns, the stored values and each critic in unlinked temporary
    files. The verdict does not depend on how the rollouts were batched or ordered, rounding aside.
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
    ) -> None:
        """Args:
        critics: names of the critics; with none, only the baselines are judged.
        cliprange_value: the clip's half-width eps around the stored values; None for plain squared error.
        by: names of label columns; the rollouts with each of their values are also judged apart.
        resamples: bootstrap resamples of the prompt groups.
        seed: of the bootstrap.
        positions: equal parts of a response in `by_position`.
        """
        if len(set(critics)) != len(critics):
            raise ValueError(f"critics must have different names: {list(critics)}")
        if positions < 1 or resamples < 1:
            raise ValueError("positions and resamples must be at least 1")
        self._critics = list(critics)
        self._cliprange = cliprange_value
        self._resamples, self._seed = resamples, seed
        self._evidence = Evidence(critics, cliprange_value=cliprange_value, by=by, positions=positions)

    def add(self, rollouts: Rollouts, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Take in whole rollouts and what each critic says of their tokens.

        A prompt group may be spread over any number of calls. Rollouts without response tokens are left out.
        Where any batch lacks stored values, the verdict says nothing of stored values or the clip.

        Args:
            rollouts: n rollouts, T tokens.
            values: critic name -> float32 [T], aligned like `rollouts.returns`; read under response_mask only.

        Raises:
            ModelError: a critic's value is not finite.
            DataError: a return or stored value is not finite, or a `by` column is missing.
            MachineError: the temporary folder has no room.
            ValueError: a critic is missing or unknown, or its values have the wrong length.
        """
        self._evidence.add(rollouts, values)

    def verdict(self) -> dict[str, Any]:
        """All figures, ready for JSON; None stands for a figure that does not exist. May be called again.

        Returns:
            rollouts, response_tokens, prompt_groups: counts.
            returns: {mean, std, min, max} over response tokens (std divides by their number).
            critics: name -> metrics.
            baselines: constant (the mean return of these rollouts), stored (V_old, where every batch had it)
                and group_mean (the leave-one-out mean of the prompt group, GRPO's baseline; `lone_rollouts`
                were alone in their group and got the constant) -> metrics.
            differences: "a - b" -> {difference, interval} of explained variance, for each pair of critics.
            See the module for the metrics.
        """
        evidence = self._evidence
        population = evidence.population()
        arrived = evidence.returns()
        total = pool_all(population.returns)
        group = np.empty_like(population.group)
        group[population.order] = population.group
        peers, lone = leave_one_out(arrived.mean, group, float(total.mean[0]))
        fixed = {CONSTANT: np.full(len(peers), total.mean[0]), GROUP_MEAN: peers}

        sums = {**evidence.predictions(), **evidence.replay(fixed)}
        errors = {name: s.error.moments(arrived.count)[population.order] for name, s in sums.items()}
        resampled = resample(population, errors, self._resamples, self._seed)
        spearman = evidence.spearman(fixed)
        metrics = {}
        for name, s in sums.items():
            found = figures(name, s, errors[name], population, resampled)
            tables = {key: found.pop(key) for key in _TABLES}
            found["spearman"] = spearman[name]
            metrics[name] = found | self._clip_figures(s, found["mse"]) | tables
        for name in evidence.predictions():
            metrics[name]["explained_variance_minus"] = {
                other: difference(name, other, metrics, resampled)
                for other in (STORED, GROUP_MEAN)
                if other in metrics and name not in (other, CRITIC + other)
            }
        metrics[GROUP_MEAN]["lone_rollouts"] = lone
        pairs = [(a, b) for i, a in enumerate(self._critics) for b in self._critics[i + 1 :]]
        return {
            "rollouts": len(arrived.count),
            "response_tokens": int(total.count[0]),
            "prompt_groups": population.groups,
            "returns": self._return_figures(total),
            "critics": {name: metrics[CRITIC + name] for name in self._critics},
            "baselines": {name: metrics[name] for name in (CONSTANT, STORED, GROUP_MEAN) if name in metrics},
            "differences": {f"{a} - {b}": difference(CRITIC + a, CRITIC + b, metrics, resampled) for a, b in pairs},
        }

    def _clip_figures(self, sums: PredictionSums, mse: float | None) -> dict[str, float | None]:
        tokens = sums.pairs.count
        if self._cliprange is None:
            return {
                "value_loss": None if mse is None else 0.5 * mse,
                "clipfrac": None,
                "saturation": None,
            }
        if not tokens or not self._evidence.has_stored:
            return {"value_loss": None, "clipfrac": None, "saturation": None}
        return {
            "value_loss": sums.clip.loss / tokens,
            "clipfrac": sums.clip.clipped / tokens,
            "saturation": sums.clip.saturated / tokens,
        }

    def _return_figures(self, total: Moments) -> dict[str, float | None]:
        tokens = int(total.count[0])
        if not tokens:
            return {"mean": None, "std": None, "min": None, "max": None}
        return {
            "mean": float(total.mean[0]),
            "std": float(np.sqrt(total.squares[0] / tokens)),
            "min": self._evidence.smallest_return,
            "max": self._evidence.largest_return,
        }
