"""The fused baseline in place of a critic's values: estimated from all rollouts first, then applied to each.

What is fused, and by which formula, is in `data.mixture`. Memory: about 70 bytes a rollout.
"""

from dataclasses import fields, replace

import numpy as np
from numpy.typing import NDArray

from critic_train.data.mixture import FEWEST_PROMPTS, FusedBaseline, Residuals, fused_baseline, fused_weights
from critic_train.data.returns import ReturnRecipe, monte_carlo
from critic_train.errors import DataError
from critic_train.rollouts import Rollouts

Floats = NDArray[np.float64]


class FusedValues:
    """Takes in all rollouts with a critic's values, then gives the fused baseline of each.

    Rollouts without response tokens, and those that --truncated drop leaves without a return, count nowhere and keep
    the critic's own values.

    Args:
        recipe: of returns; the rewards to come follow from it at lambda 1.
    """

    def __init__(self, recipe: ReturnRecipe) -> None:
        self._recipe = replace(recipe, kind="mc", lam=1.0) if recipe.from_rewards else recipe
        self._parts: list[Floats] = []
        self._groups: list[NDArray[np.int64]] = []
        self._rows: dict[str, list[NDArray[np.int64]]] = {}
        self._lines: dict[str, Floats] = {}

    def add(self, file: str, rollouts: Rollouts, values: NDArray[np.float32]) -> None:
        """Take in rollouts, file by file.

        Args:
            file: its name.
            rollouts: n rollouts, T tokens, with rewards, or else with returns that end in their outcome.
            values: float32 [T], the critic's.
        """
        self._parts.append(_quantities(rollouts, values, self._recipe))
        self._groups.append(rollouts.group)
        self._rows.setdefault(file, []).append(rollouts.row)

    def estimate(self) -> FusedBaseline:
        """Estimate the weights from all rollouts that were taken in.

        Raises:
            DataError: there are too few prompts, or none with two rollouts.
        """
        quantities = np.concatenate([np.empty((6, 0)), *self._parts], axis=1)
        self._parts.clear()
        counted = np.flatnonzero(~np.isnan(quantities[0]))
        keys, group = np.unique(np.concatenate([np.empty(0, np.int64), *self._groups])[counted], return_inverse=True)
        names = [field.name for field in fields(Residuals)]
        residuals = Residuals(**dict(zip(names, quantities[:, counted], strict=True)))
        weights = fused_weights(residuals, group.astype(np.int64), len(keys)) if len(counted) else None
        if weights is None:
            raise DataError(
                f"--baseline fused cannot be estimated: {len(counted):,} rollouts of {len(keys):,} prompts",
                hint=f"it needs {FEWEST_PROMPTS} prompts, two of them with two rollouts; --baseline critic does not",
            )
        fused = fused_baseline(residuals, group.astype(np.int64), weights)
        lines = np.stack([np.zeros(quantities.shape[1]), np.ones(quantities.shape[1])])
        lines[:, counted] = fused.offset, fused.scale
        start = 0
        for file, parts in self._rows.items():
            self._rows[file] = [np.concatenate(parts)]
            stop = start + len(self._rows[file][0])
            self._lines[file] = lines[:, start:stop]
            start = stop
        return fused

    def of(self, file: str, rollouts: Rollouts, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The fused baseline of rollouts that were taken in: float32 [T], 0 off the mask. Args as for `add`."""
        at = np.searchsorted(self._rows[file][0], rollouts.row)
        offset, scale = (np.repeat(x[at], rollouts.lengths) for x in self._lines[file])
        return np.where(rollouts.response_mask, offset + scale * values, 0.0).astype(np.float32)


def _quantities(rollouts: Rollouts, values: NDArray[np.float32], recipe: ReturnRecipe) -> Floats:
    """float64 [6, n], the fields of `Residuals` in order; NaN for rollouts that count nowhere."""
    quantities = np.full((6, len(rollouts)), np.nan)
    counts = rollouts.response_counts
    used = np.flatnonzero(counts)
    if not len(used):
        return quantities
    lengths = counts[used]
    starts = np.cumsum(lengths) - lengths
    tokens = np.flatnonzero(rollouts.response_mask)
    v = values[tokens].astype(np.float64)
    outcome, to_come = _outcomes(rollouts, values, recipe, tokens, starts)

    def mean(x: Floats) -> Floats:
        return np.asarray(np.add.reduceat(x, starts) / lengths)

    first = v[starts]
    movement, target = (x - np.repeat(first, lengths) for x in (v, to_come))
    quantities[:, used] = (
        first,
        outcome - first,
        mean(target),
        mean(movement),
        mean(movement**2),
        mean(movement * target),
    )
    if recipe.truncated == "drop" and rollouts.truncated is not None:
        quantities[:, rollouts.truncated] = np.nan
    return quantities


def _outcomes(
    rollouts: Rollouts,
    values: NDArray[np.float32],
    recipe: ReturnRecipe,
    tokens: NDArray[np.int64],
    starts: NDArray[np.int64],
) -> tuple[Floats, Floats]:
    """(float64 [m] outcomes, float64 [response tokens] rewards to come) of the m rollouts with response tokens.

    The sum of the rewards; without rewards the last return, as `eval` has it.
    """
    if rollouts.rewards is None:
        outcome = rollouts.returns[tokens[np.append(starts[1:], len(tokens)) - 1]].astype(np.float64)
        return outcome, np.repeat(outcome, np.diff(np.append(starts, len(tokens))))
    rewards = rollouts.rewards
    if recipe.from_rewards:
        to_come = recipe.returns(rollouts, values).astype(np.float64)
    else:
        to_come = monte_carlo(rewards, rollouts.response_mask, rollouts.offsets, gamma=1.0)
    return np.add.reduceat(rewards[tokens].astype(np.float64), starts), to_come[tokens]
