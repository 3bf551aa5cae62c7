"""The verdict put together: the figures of every prediction, of the baselines, and of pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from critic_train.evaluation.accumulate import CRITIC, RETURNS, STORED, EvalAccumulator
from critic_train.evaluation.advantages import AdvantageRecipe, same_for_all_tokens
from critic_train.evaluation.breakdowns import best_and_worst_groups, by_label, by_length, by_position
from critic_train.evaluation.metric_sums import Sums
from critic_train.evaluation.metrics import Kind, Samples, difference, figures_of, metrics_of, samples_of
from critic_train.evaluation.moments import Floats, Moments, leave_one_out, pool, pool_all
from critic_train.evaluation.resampling import resample
from critic_train.evaluation.second_pass import PredictionDetails, SecondPass, second_pass
from critic_train.evaluation.token_sums import Population

CONSTANT, GROUP_MEAN = "constant", "group_mean"
MAIN = "explained_variance"
"""The metric that is compared with the baselines and between critics before all others."""
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
    """

    kind: Kind
    sums: Sums
    errors: Moments
    by_position: Moments
    details: PredictionDetails
    monte_carlo: Sums | None
    samples: Samples


def without_tables(metrics: dict[str, Any]) -> dict[str, Any]:
    """The single figures of a critic's or a baseline's metrics."""
    return {name: figure for name, figure in metrics.items() if name not in _TABLES}


def give_verdict(accumulated: EvalAccumulator, options: JudgeOptions) -> dict[str, Any]:
    """See Judge.verdict."""
    population = accumulated.population()
    returns = accumulated.returns()
    total = pool_all(population.returns)
    peers, lone = leave_one_out(returns.mean, population.arrived_group, float(total.mean[0]))
    fixed = {CONSTANT: np.full(len(peers), total.mean[0]), GROUP_MEAN: peers}
    passed = second_pass(accumulated, population, options.advantage, resamples=options.resamples, seed=options.seed)
    predictions = _predictions(accumulated, population, passed, fixed, options, has_peers=lone < len(peers))
    metrics = {name: _metrics(prediction, population) for name, prediction in predictions.items()}
    _fill_in_uids(metrics, options.uids)
    for name in accumulated.predictions():
        metrics[name]["explained_variance_minus"] = {
            other: _difference(name, other, MAIN, metrics, predictions)
            for other in (STORED, GROUP_MEAN)
            if other in metrics and name not in (other, CRITIC + other)
        }
    metrics[GROUP_MEAN]["lone_rollouts"] = lone
    return {
        "rollouts": len(returns.count),
        "response_tokens": int(total.count[0]),
        "prompt_groups": population.groups,
        "returns": _return_figures(total, accumulated),
        "return_histogram": passed.return_histogram,
        "advantage": options.advantage.record(),
        "critics": {name: metrics[CRITIC + name] for name in options.critics},
        "baselines": {name: metrics[name] for name in (CONSTANT, STORED, GROUP_MEAN) if name in metrics},
        "differences": {
            f"{a} - {b}": {
                **_difference(CRITIC + a, CRITIC + b, MAIN, metrics, predictions),
                **{
                    metric.name: _difference(CRITIC + a, CRITIC + b, metric.name, metrics, predictions)
                    for metric in metrics_of()
                    if metric.compared
                },
            }
            for i, a in enumerate(options.critics)
            for b in options.critics[i + 1 :]
        },
    }


def _predictions(
    accumulated: EvalAccumulator,
    population: Population,
    passed: SecondPass,
    fixed: dict[str, Floats],
    options: JudgeOptions,
    *,
    has_peers: bool,
) -> dict[str, _Prediction]:
    """Stored values, critics, and the baselines whose values are `fixed` for each rollout, all resampled together."""
    sums = {**accumulated.predictions(), **accumulated.replay(fixed)}
    spearman = accumulated.spearman(fixed)
    counts = accumulated.returns().count
    errors = {name: population.sort(s.error.moments(counts)) for name, s in sums.items()}
    advantages = _advantages(accumulated, population, passed)
    monte_carlo = _monte_carlo(population, passed)
    moments = {RETURNS: population.returns, **errors, **advantages, **monte_carlo}
    resampled = resample(population.group, population.groups, moments, options.resamples, options.seed)

    def beside(error: str, target: str, **more: Any) -> Sums | None:
        """The sums of one quantity beside another's; None where one of them does not exist."""
        if error not in moments or target not in moments:
            return None
        within = [float(pool(moments[x], population.group, population.groups).squares.sum()) for x in (error, target)]
        return Sums.of(
            pool_all(moments[error]),
            pool_all(moments[target]),
            error_within=within[0],
            target_within=within[1],
            resampled=(resampled[error], resampled[target]) if resampled else None,
            **more,
        )

    predictions = {}
    for name, own in sums.items():
        kind: Kind = "constant" if name == CONSTANT else "group_mean" if name == GROUP_MEAN else "values"
        details = passed.predictions.get(name, PredictionDetails())
        overall = beside(
            name,
            RETURNS,
            prediction=own,
            spearman=spearman[name],
            cliprange_value=options.cliprange_value,
            has_clip=options.cliprange_value is not None and accumulated.has_stored,
            calibration=details.calibration,
            discrimination=details.discrimination,
            advantages=beside(ADVANTAGE + name, ADVANTAGE + GROUP_MEAN),
            has_peers=has_peers,
        )
        assert overall is not None
        predictions[name] = _Prediction(
            kind=kind,
            sums=overall,
            errors=errors[name],
            by_position=own.error.by_position,
            details=details,
            monte_carlo=beside(MONTE_CARLO + name, MONTE_CARLO),
            samples=samples_of(overall, kind),
        )
    return predictions


def _metrics(prediction: _Prediction, population: Population) -> dict[str, Any]:
    """All figures and tables of one prediction, in the order of the JSON."""
    kind, details = prediction.kind, prediction.details
    metrics = figures_of(prediction.sums, kind, prediction.samples)
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
    figures = figures_of(sums, prediction.kind, samples, "monte_carlo")
    excess = difference(against_returns, figures[MAIN], prediction.samples.get(MAIN), samples.get(MAIN))
    return figures | {f"{MAIN}_excess": excess}


def _advantages(accumulated: EvalAccumulator, population: Population, passed: SecondPass) -> dict[str, Moments]:
    """ADVANTAGE and a name -> moments of each rollout's advantages, in the population's order; GRPO's by GROUP_MEAN."""
    outcomes = accumulated.outcomes()
    if not len(outcomes):
        return {}
    peers, _ = leave_one_out(outcomes, population.arrived_group, float(outcomes.mean()))
    advantages = {name: d.advantages for name, d in passed.predictions.items() if d.advantages is not None}
    advantages[GROUP_MEAN] = same_for_all_tokens(outcomes - peers, accumulated.returns().count)
    return {ADVANTAGE + name: population.sort(moments) for name, moments in advantages.items()}


def _monte_carlo(population: Population, passed: SecondPass) -> dict[str, Moments]:
    """MONTE_CARLO and a name -> moments of the errors against Monte-Carlo returns; MONTE_CARLO alone: of these."""
    moments = {MONTE_CARLO + name: d.monte_carlo for name, d in passed.predictions.items()}
    moments[MONTE_CARLO] = passed.monte_carlo
    return {name: population.sort(of_rollouts) for name, of_rollouts in moments.items() if of_rollouts is not None}


def _difference(
    a: str, b: str, metric: str, metrics: dict[str, dict[str, Any]], predictions: dict[str, _Prediction]
) -> dict[str, Any]:
    samples_a, samples_b = (predictions[name].samples.get(metric) for name in (a, b))
    return difference(metrics[a][metric], metrics[b][metric], samples_a, samples_b)


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
