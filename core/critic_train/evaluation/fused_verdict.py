"""The fused baseline of every critic: its values, its advantages, and what it is worth in rollouts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from critic_train.data.mixture import FusedBaseline, FusedWeights, Residuals, fused_baseline, fused_weights
from critic_train.evaluation.accumulate import CRITIC, Derived, EvalAccumulator
from critic_train.evaluation.advantages import AdvantageMoments, AdvantageRecipe, on_a_line
from critic_train.evaluation.moments import Floats, Moments
from critic_train.evaluation.second_pass import PredictionDetails, SecondPass
from critic_train.evaluation.token_sums import Population
from critic_train.evaluation.worth import WorthOutcomes, share_columns

FUSED = "fused:"
"""Before a critic's name: the name among predictions of what is fused with it."""


def residuals_of(details: PredictionDetails, sums: Moments, outcomes: Floats) -> Residuals:
    """What the fused baseline of a prediction is made of; see `data.mixture`.

    Args:
        details: of the prediction.
        sums: moments of each rollout's rewards to come, [m].
        outcomes: float64 [m].
    """
    first, values = details.first_value, details.values
    count = np.maximum(values.count, 1)
    movement, target = values.mean - first, sums.mean - first
    product = (sums.squares + values.squares - details.apart.squares) / 2
    return Residuals(
        first_value=first,
        residual=outcomes - first,
        target=target,
        movement=movement,
        movement_square=values.squares / count + movement**2,
        movement_target=product / count + movement * target,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """A critic fused with the mean of the prompt's other rollouts.

    Attributes:
        of: the critic's name among predictions.
        baseline: its values.
        residuals, weights: what they follow from.
    """

    of: str
    baseline: FusedBaseline
    residuals: Residuals
    weights: FusedWeights

    @property
    def derived(self) -> Derived:
        """Its values as a prediction."""
        return Derived(of=self.of, offset=self.baseline.offset, scale=self.baseline.scale)

    def shares(self) -> dict[str, float]:
        """The mean over prompts of both weights."""
        return {
            "prompt_weight": float(self.baseline.prompt_weight.mean()),
            "response_weight": float(self.baseline.response_weight.mean()),
        }


def fused_predictions(accumulated: EvalAccumulator, population: Population, passed: SecondPass) -> dict[str, Fused]:
    """FUSED and a critic's name -> the critic fused; none where there are too few prompts or no two rollouts of one."""
    outcomes, group = accumulated.outcomes(), population.arrived_group
    made = {}
    for name, details in passed.predictions.items():
        if not name.startswith(CRITIC) or not len(details.first_value):
            continue
        residuals = residuals_of(details, passed.sums, outcomes)
        weights = fused_weights(residuals, group, population.groups)
        if weights is not None:
            baseline = fused_baseline(residuals, group, weights)
            fused = Fused(of=name, baseline=baseline, residuals=residuals, weights=weights)
            made[FUSED + name.removeprefix(CRITIC)] = fused
    return made


def fused_advantages(
    accumulated: EvalAccumulator, passed: SecondPass, fused: Fused, recipe: AdvantageRecipe
) -> Moments:
    """Moments of each rollout's advantages with the fused baseline, in order of arrival."""
    details, line = passed.predictions[fused.of], fused.baseline
    if not recipe.bootstraps:
        return on_a_line(passed.sums, details.values, details.apart, line.offset, line.scale)
    advantages = AdvantageMoments(len(line.offset), recipe)
    for block in accumulated.scan(fused.of):
        lengths, part = block.lengths, block.rollouts
        values = np.repeat(line.offset[part], lengths) + np.repeat(line.scale[part], lengths) * block.values
        advantages.add(replace(block, values=values.astype(np.float32)))
    return advantages.moments(passed.sums.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptColumns:
    """Sums of each prompt group that are resampled beside the moments of the predictions.

    Attributes:
        columns: float64 [groups, k].
        parts: name -> where its columns stand; "share", "outcomes", then the names of `fused_predictions`.
        sizes: the k of `WorthOutcomes`.
    """

    columns: Floats
    parts: dict[str, slice]
    sizes: list[int]


def prompt_columns(
    accumulated: EvalAccumulator, population: Population, passed: SecondPass, fused: Mapping[str, Fused]
) -> PromptColumns:
    """For the share of the variance between prompts, and for what each critic is worth."""
    group, outcomes = population.arrived_group, accumulated.outcomes()
    size = np.bincount(group, minlength=population.groups)
    columns = {"share": share_columns(outcomes, group, size)}
    sizes: list[int] = []
    if fused:
        worth = WorthOutcomes(group=group, size=size, sums=passed.sums, outcomes=outcomes)
        sizes = worth.sizes
        columns["outcomes"] = worth.columns()
        for name, one in fused.items():
            details = passed.predictions[one.of]
            columns[name] = worth.critic_columns(details.values, details.apart, one.residuals, one.weights)
    ends = np.append(0, np.cumsum([part.shape[1] for part in columns.values()])).tolist()
    parts = {name: slice(ends[i], ends[i + 1]) for i, name in enumerate(columns)}
    return PromptColumns(columns=np.concatenate(list(columns.values()), axis=1), parts=parts, sizes=sizes)
