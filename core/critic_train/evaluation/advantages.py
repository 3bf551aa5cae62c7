"""The advantages that a policy would be trained with: GAE's with a prediction as the critic, and GRPO's."""

from dataclasses import dataclass

import numpy as np

from critic_train.data.returns import ReturnRecipe, gae
from critic_train.evaluation.moments import Floats, Integers, Moments, segment_moments
from critic_train.evaluation.token_sums import Block


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageRecipe:
    """How advantages are estimated.

    Attributes:
        gamma: discount.
        lam: GAE's lambda. At 1, the default, an advantage is the return still to come less V, an estimate of the same
            quantity as GRPO's reward less the group's mean, so that less variance is better. Below 1 the reward
            reaches early tokens shrunk, and even a constant would seem to take variance away.
        length_alpha: VAPO's alpha (arXiv 2504.05118), lambda 1 - 1 / (alpha * response tokens) for each rollout and 0
            where that is negative; None for one lambda.
    """

    gamma: float = 1.0
    lam: float = 1.0
    length_alpha: float | None = None

    @classmethod
    def of(cls, recipe: ReturnRecipe) -> "AdvantageRecipe":
        """The advantages that go with a recipe for returns: at the policy's lambda."""
        lam = 1.0 if recipe.lam_policy is None else recipe.lam_policy
        return cls(gamma=recipe.gamma, lam=lam, length_alpha=recipe.length_alpha)

    @property
    def bootstraps(self) -> bool:
        """Whether an advantage depends on later values; else it is the sum of the rewards to come less the value."""
        return self.length_alpha is not None or self.lam != 1.0

    def at_lambda_1(self) -> "AdvantageRecipe":
        """The same discount, nothing bootstrapped."""
        return AdvantageRecipe(gamma=self.gamma)

    def lambdas(self, lengths: Integers) -> float | Floats:
        """One lambda for all, or float64 [n] for rollouts of `lengths` response tokens."""
        if self.length_alpha is None:
            return self.lam
        lambdas: Floats = np.maximum(0.0, 1.0 - 1.0 / (self.length_alpha * lengths))
        return lambdas

    def record(self) -> dict[str, float | None]:
        """{gamma, lam}; lam is None where each rollout has its own."""
        return {"gamma": self.gamma, "lam": self.lam if self.length_alpha is None else None}


class AdvantageMoments:
    """Moments of GAE's advantages of each rollout, with one prediction's values."""

    def __init__(self, rollouts: int, recipe: AdvantageRecipe) -> None:
        self.rollouts, self._recipe = rollouts, recipe
        self._means, self._squares = np.zeros(rollouts), np.zeros(rollouts)

    def add(self, block: Block) -> None:
        """Take in a block. Without rewards, the return of the last response token is the reward, given there."""
        offsets = np.append(block.starts, len(block.values))
        rewards = block.rewards
        if rewards is None:
            rewards = np.zeros_like(block.returns)
            rewards[offsets[1:] - 1] = block.returns[offsets[1:] - 1]
        advantages, _ = gae(
            rewards,
            block.values,
            np.ones(len(rewards), dtype=np.bool_),
            offsets,
            gamma=self._recipe.gamma,
            lam=self._recipe.lambdas(block.lengths),
        )
        moments = segment_moments(advantages, block.starts, block.lengths, block.owner)
        self._means[block.rollouts], self._squares[block.rollouts] = moments.mean, moments.squares

    def moments(self, counts: Integers) -> Moments:
        """Moments of each rollout, in order of arrival; `counts` are their response tokens."""
        return Moments(counts, self._means, self._squares)


def on_a_line(sums: Moments, values: Moments, apart: Moments, offset: Floats, scale: Floats) -> Moments:
    """Moments of each rollout's M - (offset + scale * V), without a pass over its tokens.

    Args:
        sums, values, apart: moments of each rollout's M, of its V and of its M - V, [m].
        offset, scale: float64 [m].
    """
    product = (sums.squares + values.squares - apart.squares) / 2
    squares = sums.squares - 2 * scale * product + scale * scale * values.squares
    return Moments(sums.count, sums.mean - offset - scale * values.mean, np.maximum(squares, 0.0))


def negated(moments: Moments) -> Moments:
    """Moments of the same numbers with the sign turned."""
    return Moments(moments.count, -moments.mean, moments.squares)


def same_for_all_tokens(advantages: Floats, counts: Integers) -> Moments:
    """Moments of advantages that do not change along a rollout, as GRPO's: float64 [m], one a rollout."""
    return Moments(counts, advantages, np.zeros(len(advantages)))
