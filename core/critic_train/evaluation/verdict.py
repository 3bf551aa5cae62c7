"""The verdict put together: the figures of every prediction, of the baselines, and of pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from critic_train.evaluation.accumulate import CRITIC, RETURNS, STORED, Derived, EvalAccumulator
from critic_train.evaluation.advantages import AdvantageRecipe, same_for_all_tokens
from critic_train.evaluation.breakdowns import best_and_worst_groups, by_label, by_length, by_position
from critic_train.evaluation.fused_verdict import (
    FUSED,
    Fused,
    PromptColumns,
    fused_advantages,
    fused_predictions,
    prompt_columns,
)
from critic_train.evaluation.metric_figures import Samples, difference, figures_of, samples_of
from critic_train.evaluation.metric_sums import Sums
from critic_train.evaluation.metrics import Kind, metrics_of
from critic_train.evaluation.moments import Floats, Moments, leave_one_out, pool, pool_all
from critic_train.evaluation.resampling import ResampledSums, Resampling, resample
from critic_train.evaluation.second_pass import PredictionDetails, SecondPass, second_pass
from critic_train.evaluation.token_sums import Population
from critic_train.evaluation.worth import NO_WORTH, Worth, between_prompt_share

CONSTANT, GROUP_MEAN, MIXTURE = "constant", "group_mean", "fused"
MAIN, REDUCTION = "explained_variance", "variance_reduction"
"""The metrics by which critics are compared with the baselines, and the fused baseline with what it is made of."""
ADVANTAGE, MONTE_CARLO = "advantage:", "monte carlo:"  # before a prediction's name, among what is resampled
_TABLES = (
    "return_histogram",
    "calibration",
    "auc_by_position",
    "value_histogram",
    "by_position",
    "by_length",
    "groups",
    "by",
)

UidLookup = Callable[[Sequence[int]], dict[int, str | None]]
"""Row numbers in the data set -> the uid of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeOptions:
    """How the judge was set up; see Judge."""

    critics: tuple[str, ...]
    cliprange_value: float | None
    resamples: int
    seed: int
    uids: UidLookup | None
    advantage: AdvantageRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prediction:
    """One prediction, with all that its part of the verdict is made of.

    Attributes:
        kind: see `metrics.Kind`.
        sums: over all response tokens.
        errors: moments of each rollout's errors, in the population's order.
        by_position: moments of the errors at each part of the response.
        details: of the second pass.
        monte_carlo: the sums against Monte-Carlo returns; None without rewards.
        samples: the metrics in each resample.
        resampling: of the prompt groups.
    """

    kind: Kind
    sums: Sums
    errors: Moments
    by_position: Moments
    details: PredictionDetails
    monte_carlo: Sums | None
    samples: Samples
    resampling: Resampling


def without_tables(metrics: dict[str, Any]) -> dict[str, Any]:
    """The single figures of a critic's or a baseline's metrics."""
    return {name: figure for name, figure in metrics.items() if name not in _TABLES}


def give_verdict(accumulated: EvalAccumulator, options: JudgeOptions) -> dict[str, Any]:
    """See Judge.verdict."""
    population = accumulated.population()
    returns = accumulated.returns()
    total = pool_all(population.returns)
    peers, lone = leave_one_out(returns.mean, population.arrived_group, float(total.mean[0]))
    resampling = Resampling.of(population.group, population.groups, population.returns, options.resamples, options.seed)
    passed = second_pass(accumulated, population, options.advantage, resampling)
    judgement = _Judgement(
        accumulated=accumulated,
        population=population,
        passed=passed,
        fused=fused_predictions(accumulated, population, passed),
        options=options,
        resampling=resampling,
        has_peers=lone < len(peers),
    )
    predictions, share = judgement.predictions(np.full(len(peers), total.mean[0]), peers)
    metrics = {name: _metrics(prediction, population) for name, prediction in predictions.items()}
    _fill_in_uids(metrics, options.uids)
    compared = _Compared(metrics, predictions, resampling)
    for name in accumulated.predictions():
        metrics[name]["explained_variance_minus"] = {
            other: compared.difference(name, other, MAIN)
            for other in (STORED, GROUP_MEAN)
            if (other in metrics or other == GROUP_MEAN) and name not in (other, CRITIC + other)
        }
    mixtures = {critic: _mixture(critic, judgement, compared) for critic in options.critics}
    for critic, mixture in mixtures.items():
        metrics[CRITIC + critic]["fused"] = without_tables(mixture)
        worth = predictions[CRITIC + critic].sums.worth
        metrics[CRITIC + critic]["worth"] = worth.figures() if worth else dict(NO_WORTH)
    group_mean = metrics.get(GROUP_MEAN) or _nothing("group_mean", resampling)
    baselines = {name: metrics[name] for name in (CONSTANT, STORED) if name in metrics}
    baselines[GROUP_MEAN] = group_mean | {"lone_rollouts": lone}
    if mixtures:
        baselines[MIXTURE] = next(iter(mixtures.values()))
    return {
        "rollouts": len(returns.count),
        "response_tokens": int(total.count[0]),
        "prompt_groups": population.groups,
        "returns": _return_figures(total, accumulated),
        "return_histogram": passed.return_histogram,
        "between_prompt_share": share[0],
        "between_prompt_share_interval": share[1],
        "advantage": options.advantage.record(),
        "critics": {name: metrics[CRITIC + name] for name in options.critics},
        "baselines": baselines,
        "differences": {
            f"{a} - {b}": compared.critics(CRITIC + a, CRITIC + b)
            for i, a in enumerate(options.critics)
            for b in options.critics[i + 1 :]
        },
    }


@dataclass(frozen=True, slots=True)
class _Compared:
    """All predictions beside each other."""

    metrics: dict[str, dict[str, Any]]
    predictions: dict[str, _Prediction]
    resampling: Resampling

    def difference(self, a: str, b: str, metric: str) -> dict[str, Any]:
        """A metric of one prediction less that of another, with its interval; None where one of them is not there."""
        if a not in self.predictions or b not in self.predictions:
            return {"difference": None, "interval": None}
        samples_a, samples_b = (self.predictions[name].samples.get(metric) for name in (a, b))
        return difference(
            self.metrics[a].get(metric), self.metrics[b].get(metric), samples_a, samples_b, self.resampling
        )

    def critics(self, a: str, b: str) -> dict[str, Any]:
        """How two critics differ: in MAIN, and in it by the name of each other metric that critics are compared by."""
        others = [metric.name for metric in metrics_of() if metric.compared]
        return {**self.difference(a, b, MAIN), **{name: self.difference(a, b, name) for name in others}}


def _mixture(critic: str, judgement: "_Judgement", compared: _Compared) -> dict[str, Any]:
    """The metrics of what is fused with a critic, its weights, and how it differs from what it is made of."""
    name, of = FUSED + critic, CRITIC + critic
    fused = judgement.fused.get(name)
    shares = fused.shares() if fused else {"prompt_weight": None, "response_weight": None}
    return (
        (compared.metrics.get(name) or _nothing("fused", judgement.resampling))
        | {"of": critic, **shares}
        | {
            "explained_variance_minus": {
                "critic": compared.difference(name, of, MAIN),
                GROUP_MEAN: compared.difference(name, GROUP_MEAN, MAIN),
            },
            "variance_reduction_minus": {"critic": compared.difference(name, of, REDUCTION)},
        }
    )


def _nothing(kind: Kind, resampling: Resampling) -> dict[str, Any]:
    """The metrics of a baseline that does not exist for these rollouts."""
    empty = Sums(tokens=0, error_mean=0.0, error_squares=0.0, target_squares=0.0)
    return figures_of(empty, kind, {}, resampling) | {"by_position": [], "by_length": [], "by": {}}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judgement:
    """What all predictions are judged with."""

    accumulated: EvalAccumulator
    population: Population
    passed: SecondPass
    fused: dict[str, Fused]
    options: JudgeOptions
    resampling: Resampling
    has_peers: bool

    def predictions(
        self, constant: Floats, peers: Floats
    ) -> tuple[dict[str, _Prediction], tuple[float | None, list[float] | None]]:
        """Stored values, critics and the other baselines, all resampled together.

        Args:
            constant, peers: float64 [m], the values of these baselines, in order of arrival.

        Returns:
            (name -> prediction; the share of the outcomes' variance between prompts, with its interval).
        """
        accumulated, population, passed = self.accumulated, self.population, self.passed
        derived = {CONSTANT: Derived(offset=constant)}
        if self.has_peers:
            derived[GROUP_MEAN] = Derived(offset=peers)
        derived |= {name: fused.derived for name, fused in self.fused.items()}
        sums = {**accumulated.predictions(), **accumulated.replay(derived)}
        spearman = accumulated.spearman(derived)
        counts = accumulated.returns().count
        errors = {name: population.sort(s.error.moments(counts)) for name, s in sums.items()}
        advantages = _advantages(accumulated, population, passed, self.fused, self.options.advantage)
        moments = {RETURNS: population.returns, **errors, **advantages, **_monte_carlo(population, passed, accumulated)}
        further = prompt_columns(accumulated, population, passed, self.fused)
        resampled, more = resample(population.group, moments, self.resampling, further.columns)
        more = np.concatenate([further.columns.sum(axis=0, keepdims=True), more])
        pairs = _Pairs(population=population, moments=moments, resampled=resampled)
        predictions = {}
        for name, own in sums.items():
            details = passed.predictions.get(name, PredictionDetails())
            overall = pairs.beside(
                name,
                RETURNS,
                prediction=own,
                spearman=spearman[name],
                cliprange_value=self.options.cliprange_value,
                has_clip=self.options.cliprange_value is not None and accumulated.has_stored,
                calibration=details.calibration,
                discrimination=details.discrimination,
                advantages=pairs.beside(ADVANTAGE + name, ADVANTAGE + GROUP_MEAN),
                has_peers=self.has_peers,
                worth=self._worth(FUSED + name.removeprefix(CRITIC), further, more),
            )
            assert overall is not None
            predictions[name] = _Prediction(
                kind=_kind(name),
                sums=overall,
                errors=errors[name],
                by_position=own.error.by_position,
                details=details,
                monte_carlo=pairs.beside(MONTE_CARLO + name, MONTE_CARLO),
                samples=samples_of(overall, _kind(name)),
                resampling=self.resampling,
            )
        return predictions, _share(more[:, further.parts["share"]], self.resampling)

    def _worth(self, mixture: str, further: PromptColumns, sums: Floats) -> Worth | None:
        """What the critic of a fused baseline is worth; None where there is none, as of a baseline."""
        if mixture not in self.fused:
            return None
        shared, of_critic = (sums[:, further.parts[part]] for part in ("outcomes", mixture))
        return Worth.of(further.sizes, shared, of_critic, self.resampling)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pairs:
    """The moments of all quantities and their resamples, by name."""

    population: Population
    moments: dict[str, Moments]
    resampled: dict[str, ResampledSums]

    def beside(self, error: str, target: str, **more: Any) -> Sums | None:
        """The sums of one quantity beside another's; None where one of them does not exist."""
        if error not in self.moments or target not in self.moments:
            return None
        group, groups = self.population.group, self.population.groups
        within = [float(pool(self.moments[x], group, groups).squares.sum()) for x in (error, target)]
        return Sums.of(
            pool_all(self.moments[error]),
            pool_all(self.moments[target]),
            error_within=within[0],
            target_within=within[1],
            resampled=(self.resampled[error], self.resampled[target]) if self.resampled else None,
            **more,
        )


def _kind(name: str) -> Kind:
    if name in (CONSTANT, GROUP_MEAN):
        return "constant" if name == CONSTANT else "group_mean"
    return "fused" if name.startswith(FUSED) else "values"


def _share(sums: Floats, resampling: Resampling) -> tuple[float | None, list[float] | None]:
    """The share of the outcomes' variance between prompts, and its interval."""
    shares = between_prompt_share(sums)
    if not np.isfinite(shares[0]):
        return None, None
    bounds = resampling.interval(float(shares[0]), shares[1:])
    ends = None if bounds is None else [min(max(0.0, end), 1.0) for end in bounds]
    return max(0.0, float(shares[0])), ends


def _metrics(prediction: _Prediction, population: Population) -> dict[str, Any]:
    """All figures and tables of one prediction, in the order of the JSON."""
    kind, details = prediction.kind, prediction.details
    metrics = figures_of(prediction.sums, kind, prediction.samples, prediction.resampling)
    has_details = kind == "values"
    if has_details:
        metrics |= {
            "monte_carlo": _monte_carlo_figures(prediction, metrics[MAIN]),
            "calibration": details.calibration,
            "auc_by_position": details.discrimination.by_position,
            "value_histogram": details.value_histogram,
        }
    metrics["by_position"] = by_position(prediction.by_position, population.by_position, kind)
    metrics["by_length"] = by_length(prediction.errors, population, kind)
    if has_details:
        metrics["groups"] = best_and_worst_groups(prediction.errors, population)
    metrics["by"] = {
        column: by_label(prediction.errors, population, labels, index, details.auc_by.get(column, []), kind)
        for column, (labels, index) in population.slices.items()
    }
    return metrics


def _monte_carlo_figures(prediction: _Prediction, against_returns: float | None) -> dict[str, Any] | None:
    """The metrics against Monte-Carlo returns, and how much less MAIN is there; None without rewards."""
    sums = prediction.monte_carlo
    if sums is None:
        return None
    samples = samples_of(sums, prediction.kind)
    resampling = prediction.resampling
    figures = figures_of(sums, prediction.kind, samples, resampling, "monte_carlo")
    excess = difference(against_returns, figures[MAIN], prediction.samples.get(MAIN), samples.get(MAIN), resampling)
    return figures | {f"{MAIN}_excess": excess}


def _advantages(
    accumulated: EvalAccumulator,
    population: Population,
    passed: SecondPass,
    fused: dict[str, Fused],
    recipe: AdvantageRecipe,
) -> dict[str, Moments]:
    """ADVANTAGE and a name -> moments of each rollout's advantages, in the population's order; GRPO's by GROUP_MEAN."""
    outcomes = accumulated.outcomes()
    if not len(outcomes):
        return {}
    peers, _ = leave_one_out(outcomes, population.arrived_group, float(outcomes.mean()))
    advantages = {name: d.advantages for name, d in passed.predictions.items() if d.advantages is not None}
    advantages[GROUP_MEAN] = same_for_all_tokens(outcomes - peers, accumulated.returns().count)
    advantages |= {name: fused_advantages(accumulated, passed, one, recipe) for name, one in fused.items()}
    return {ADVANTAGE + name: population.sort(moments) for name, moments in advantages.items()}


def _monte_carlo(population: Population, passed: SecondPass, accumulated: EvalAccumulator) -> dict[str, Moments]:
    """MONTE_CARLO and a name -> moments of the errors against Monte-Carlo returns; MONTE_CARLO alone: of these."""
    moments = {MONTE_CARLO + name: d.monte_carlo for name, d in passed.predictions.items()}
    moments[MONTE_CARLO] = passed.sums if accumulated.has_rewards else None
    return {name: population.sort(of_rollouts) for name, of_rollouts in moments.items() if of_rollouts is not None}


def _fill_in_uids(metrics: dict[str, dict[str, Any]], uids: UidLookup | None) -> None:
    """Put uids in the tables of prompt groups."""
    tables = [of_prediction["groups"] for of_prediction in metrics.values() if "groups" in of_prediction]
    shown = [row for table in tables for rows in table.values() for row in rows]
    if uids is None or not shown:
        return
    uid_of = uids(sorted({row["row"] for row in shown}))
    for row in shown:
        row["uid"] = uid_of.get(row["row"])


def _return_figures(total: Moments, accumulated: EvalAccumulator) -> dict[str, float | None]:
    tokens = int(total.count[0])
    if not tokens:
        return {"mean": None, "std": None, "min": None, "max": None}
    return {
        "mean": float(total.mean[0]),
        "std": float(np.sqrt(total.squares[0] / tokens)),
        "min": accumulated.smallest_return,
        "max": accumulated.largest_return,
    }
