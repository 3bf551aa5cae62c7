"""The verdict put together: the figures of every prediction, of the baselines, and of pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from critic_train.evaluation.accumulate import CRITIC, RETURNS, STORED, EvalAccumulator
from critic_train.evaluation.advantages import AdvantageRecipe, same_for_all_tokens
from critic_train.evaluation.breakdowns import best_and_worst_groups, by_label, by_length, by_position
from critic_train.evaluation.metrics import (
    Population,
    Samples,
    difference,
    explained_variance,
    main_figures,
    samples_of,
)
from critic_train.evaluation.moments import Moments, leave_one_out, pool_all
from critic_train.evaluation.resampling import Resampled, percentile_interval, resample
from critic_train.evaluation.second_pass import SecondPass, SecondPassStats, second_pass
from critic_train.evaluation.token_sums import PredictionSums

CONSTANT, GROUP_MEAN = "constant", "group_mean"
ADVANTAGE, MONTE_CARLO = "advantage:", "monte carlo:"  # before a prediction's name, among what is resampled
# Figures of the whole are shown and compared; tables are for those who look closer.
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

COMPARED = ("explained_variance_within_group", "auc_within_group", "mse")
"""Figures of which critics' differences are given, besides explained variance."""

UidLookup = Callable[[Sequence[int]], dict[int, str | None]]
"""Places in the data set -> the uid that stands there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """What the judge was asked for; see Judge."""

    critics: tuple[str, ...]
    cliprange_value: float | None
    resamples: int
    seed: int
    uids: UidLookup | None
    advantage: AdvantageRecipe


def without_tables(metrics: dict[str, Any]) -> dict[str, Any]:
    """The single figures of a critic's or a baseline's metrics."""
    return {name: figure for name, figure in metrics.items() if name not in _TABLES}


def give_verdict(evidence: EvalAccumulator, asked: EvalOptions) -> dict[str, Any]:
    """See Judge.verdict."""
    population = evidence.population()
    arrived = evidence.returns()
    total = pool_all(population.returns)
    peers, lone = leave_one_out(arrived.mean, population.arrived_group, float(total.mean[0]))
    fixed = {CONSTANT: np.full(len(peers), total.mean[0]), GROUP_MEAN: peers}

    sums = {**evidence.predictions(), **evidence.replay(fixed)}
    deeper = second_pass(evidence, population, asked.advantage, resamples=asked.resamples, seed=asked.seed)
    advantages = _advantages(evidence, population, deeper)
    monte_carlo = _monte_carlo(population, deeper)
    errors = {name: population.sort(s.error.moments(arrived.count)) for name, s in sums.items()}
    quantities = {RETURNS: population.returns, **errors, **advantages, **monte_carlo}
    resampled = resample(population.group, population.groups, quantities, asked.resamples, asked.seed)
    samples = {name: samples_of(resampled, name, RETURNS) for name in sums}
    spearman = evidence.spearman(fixed)
    metrics = {}
    for name, s in sums.items():
        depth = deeper.predictions.get(name, SecondPass())
        samples[name] |= depth.samples
        metrics[name] = {
            **(found := _figures(s, errors[name], population, samples[name])),
            "spearman": spearman[name],
            **_clip_figures(s, found["mse"], asked.cliprange_value, evidence.has_stored),
            **depth.figures,
            **_advantage_figures(name, advantages, resampled, against_groups=lone < len(peers)),
            **_monte_carlo_figures(name, monte_carlo, population, resampled, found),
            **_tables(s, errors[name], population, depth),
        }
    _name_groups(metrics, asked.uids)
    for name in evidence.predictions():
        metrics[name]["explained_variance_minus"] = {
            other: _difference(name, other, "explained_variance", metrics, samples)
            for other in (STORED, GROUP_MEAN)
            if other in metrics and name not in (other, CRITIC + other)
        }
    metrics[GROUP_MEAN]["lone_rollouts"] = lone
    return {
        "rollouts": len(arrived.count),
        "response_tokens": int(total.count[0]),
        "prompt_groups": population.groups,
        "returns": _return_figures(total, evidence),
        "return_histogram": deeper.return_histogram,
        "advantage": {
            "gamma": asked.advantage.gamma,
            "lam": asked.advantage.lam if asked.advantage.length_alpha is None else None,
        },
        "critics": {name: metrics[CRITIC + name] for name in asked.critics},
        "baselines": {name: metrics[name] for name in (CONSTANT, STORED, GROUP_MEAN) if name in metrics},
        "differences": {
            f"{a} - {b}": {
                **_difference(CRITIC + a, CRITIC + b, "explained_variance", metrics, samples),
                **{name: _difference(CRITIC + a, CRITIC + b, name, metrics, samples) for name in COMPARED},
            }
            for i, a in enumerate(asked.critics)
            for b in asked.critics[i + 1 :]
        },
    }


def _figures(sums: PredictionSums, errors: Moments, population: Population, samples: Samples) -> dict[str, Any]:
    tokens = sums.pairs.count
    found = main_figures(errors, population.returns, population, samples)
    bias = found.pop("bias")
    mae = sums.absolute / tokens if tokens else None
    return found | {"mae": mae, "bias": bias, "pearson": sums.pairs.correlation()}


def _advantages(evidence: EvalAccumulator, population: Population, deeper: SecondPassStats) -> dict[str, Moments]:
    """ADVANTAGE and a name -> moments of each rollout's advantages, in the population's order; GRPO's by GROUP_MEAN."""
    outcomes = evidence.outcomes()
    if not len(outcomes):
        return {}
    peers, _ = leave_one_out(outcomes, population.arrived_group, float(outcomes.mean()))
    found = {name: d.advantages for name, d in deeper.predictions.items() if d.advantages is not None}
    found[GROUP_MEAN] = same_for_all_tokens(outcomes - peers, evidence.returns().count)
    return {ADVANTAGE + name: population.sort(moments) for name, moments in found.items()}


def _advantage_figures(
    name: str, advantages: dict[str, Moments], resampled: Resampled, *, against_groups: bool
) -> dict[str, Any]:
    """Variance of the advantages, and how much of GRPO's it leaves out; nothing of the constant."""
    if name == CONSTANT:
        return {}
    own, theirs = (pool_all(advantages[ADVANTAGE + n]) if advantages else None for n in (name, GROUP_MEAN))
    figures: dict[str, Any] = {"advantage_variance": None if own is None else float(own.squares[0] / own.count[0])}
    if name == GROUP_MEAN:
        return figures
    reduction, samples = None, None
    if own is not None and theirs is not None and against_groups:
        reduction = explained_variance(float(own.squares[0]), float(theirs.squares[0]))
        samples = resampled.explained(ADVANTAGE + name, ADVANTAGE + GROUP_MEAN)
    interval = None if samples is None or reduction is None else percentile_interval(samples)
    return figures | {"variance_reduction": reduction, "variance_reduction_interval": interval}


def _monte_carlo(population: Population, deeper: SecondPassStats) -> dict[str, Moments]:
    """MONTE_CARLO -> moments of the Monte-Carlo returns, with a name behind it of the errors against them."""
    found = {MONTE_CARLO + name: d.monte_carlo for name, d in deeper.predictions.items()}
    found[MONTE_CARLO] = deeper.monte_carlo
    return {name: population.sort(moments) for name, moments in found.items() if moments is not None}


def _monte_carlo_figures(
    name: str, moments: dict[str, Moments], population: Population, resampled: Resampled, of_returns: dict[str, Any]
) -> dict[str, Any]:
    """The main figures against Monte-Carlo returns beside those against the returns; None without rewards."""
    if name in (CONSTANT, GROUP_MEAN):
        return {}
    if not moments:
        return {"monte_carlo": None}
    samples = samples_of(resampled, MONTE_CARLO + name, MONTE_CARLO)
    found = main_figures(moments[MONTE_CARLO + name], moments[MONTE_CARLO], population, samples)
    metric = "explained_variance"
    usual = samples_of(resampled, name, RETURNS).get(metric)
    excess = difference(of_returns[metric], found[metric], usual, samples.get(metric))
    return {"monte_carlo": found | {"explained_variance_excess": excess}}


def _tables(sums: PredictionSums, errors: Moments, population: Population, depth: SecondPass) -> dict[str, Any]:
    """In the order in which they are shown; a baseline that is no critic's rival in depth has fewer."""
    return {
        **depth.tables,
        "by_position": by_position(sums.error.by_position, population.by_position),
        "by_length": by_length(errors, population),
        **({"groups": best_and_worst_groups(errors, population)} if depth.tables else {}),
        "by": {
            column: by_label(errors, population, labels, index, depth.auc_by.get(column))
            for column, (labels, index) in population.slices.items()
        },
    }


def _difference(
    a: str, b: str, metric: str, metrics: dict[str, dict[str, Any]], samples: dict[str, Samples]
) -> dict[str, Any]:
    return difference(metrics[a][metric], metrics[b][metric], samples[a].get(metric), samples[b].get(metric))


def _name_groups(metrics: dict[str, dict[str, Any]], uids: UidLookup | None) -> None:
    """Put the uids of the groups shown where None stands."""
    tables = [found["groups"] for found in metrics.values() if "groups" in found]
    shown = [row for table in tables for rows in table.values() for row in rows]
    if uids is None or not shown:
        return
    known = uids(sorted({row["row"] for row in shown}))
    for row in shown:
        row["uid"] = known.get(row["row"])


def _clip_figures(
    sums: PredictionSums, mse: float | None, cliprange_value: float | None, has_stored: bool
) -> dict[str, float | None]:
    tokens = sums.pairs.count
    if cliprange_value is None:
        return {"value_loss": None if mse is None else 0.5 * mse, "clipfrac": None, "saturation": None}
    if not tokens or not has_stored:
        return {"value_loss": None, "clipfrac": None, "saturation": None}
    return {
        "value_loss": sums.clip.loss / tokens,
        "clipfrac": sums.clip.clipped / tokens,
        "saturation": sums.clip.saturated / tokens,
    }


def _return_figures(total: Moments, evidence: EvalAccumulator) -> dict[str, float | None]:
    tokens = int(total.count[0])
    if not tokens:
        return {"mean": None, "std": None, "min": None, "max": None}
    return {
        "mean": float(total.mean[0]),
        "std": float(np.sqrt(total.squares[0] / tokens)),
        "min": evidence.smallest_return,
        "max": evidence.largest_return,
    }
