"""How returns and advantages are made from rewards: the settings of the Returns panel, resolved."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from critic_train.returns.gae import Floats, gae, monte_carlo
from critic_train.rollouts import Rollouts
from critic_train.settings.returns import AUTO, Returns, ReturnsSettings, Truncated


@dataclass(frozen=True, slots=True, kw_only=True)
class ReturnRecipe:
    """Where returns come from.

    Attributes:
        kind: the shard's column, Monte-Carlo or GAE.
        gamma: discount.
        lam: lambda of the returns.
        lam_policy: lambda of the advantages; None where `length_alpha` says it.
        length_alpha: VAPO's alpha (arXiv 2504.05118): each rollout's advantages have lambda
            1 - 1 / (alpha * response tokens), so that a reward at the end reaches the start of a long response as
            well as of a short one. 0 where that is negative. None for one lambda.
        truncated: what becomes of rollouts that were cut.
    """

    kind: Returns
    gamma: float = 1.0
    lam: float = 1.0
    lam_policy: float | None = None
    length_alpha: float | None = None
    truncated: Truncated = "terminal"

    @classmethod
    def of(cls, settings: ReturnsSettings) -> "ReturnRecipe":
        """The recipe that the settings describe."""
        automatic = settings.lam_policy == AUTO
        policy = settings.lam if settings.lam_policy is None or automatic else float(settings.lam_policy)
        return cls(
            kind=settings.returns,
            gamma=settings.gamma,
            lam=settings.lam,
            lam_policy=None if automatic else policy,
            length_alpha=settings.length_alpha if automatic else None,
            truncated=settings.truncated,
        )

    @property
    def from_rewards(self) -> bool:
        """Whether returns are computed."""
        return self.kind != "column"

    @property
    def bootstraps(self) -> bool:
        """Whether a cut rollout's last value stands for what would have followed."""
        return self.from_rewards and self.truncated == "bootstrap"

    @property
    def uses_values(self) -> bool:
        """Whether returns depend on values. At lambda 1 GAE's do not: they are the sums of the rewards."""
        return self.bootstraps or (self.kind == "gae" and self.lam < 1)

    @property
    def reads_truncated(self) -> bool:
        """Whether the `truncated` column is needed."""
        return self.truncated != "terminal"

    def returns(self, rollouts: Rollouts, values: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """The return of every response token.

        Args:
            rollouts: with rewards, and with `truncated` where the recipe reads it; n rollouts, T tokens.
            values: float32 [T], V of each token's state; None where the recipe does not use them.

        Returns:
            float32 [T], 0 off the mask.
        """
        if self.kind == "gae" and self.lam < 1:
            return self._gae(rollouts, values, self.lam)[1].astype(np.float32)
        assert rollouts.rewards is not None
        return monte_carlo(
            rollouts.rewards,
            rollouts.response_mask,
            rollouts.offsets,
            gamma=self.gamma,
            bootstrap=self._bootstrap(rollouts, values),
        ).astype(np.float32)

    def advantages(self, rollouts: Rollouts, values: NDArray[np.float32]) -> Floats:
        """GAE's advantage of every response token, at the policy's lambda. Args as for `returns`.

        Returns:
            float64 [T], 0 off the mask.
        """
        lam: float | Floats | None = self.lam_policy
        if self.length_alpha is not None:
            lengths = np.maximum(rollouts.response_counts, 1)
            lam = np.maximum(0.0, 1.0 - 1.0 / (self.length_alpha * lengths))
        assert lam is not None
        return self._gae(rollouts, values, lam)[0]

    def with_returns(self, rollouts: Rollouts, values: NDArray[np.float32] | None) -> Rollouts:
        """The same rollouts with their returns put in. Args as for `returns`."""
        return replace(rollouts, returns=self.returns(rollouts, values))

    def _gae(
        self, rollouts: Rollouts, values: NDArray[np.float32] | None, lam: float | Floats
    ) -> tuple[Floats, Floats]:
        assert rollouts.rewards is not None
        assert values is not None
        return gae(
            rollouts.rewards,
            values,
            rollouts.response_mask,
            rollouts.offsets,
            gamma=self.gamma,
            lam=lam,
            bootstrap=self._bootstrap(rollouts, values),
        )

    def _bootstrap(self, rollouts: Rollouts, values: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
        """float32 [n]: what stands for the value after the last response token; 0 where the rollout ended by itself.

        Of a cut rollout it is V of its last response token's state, the last value there is: shards hold values of
        states in which a token was chosen, and none was chosen in the one after. Where no reward is given in between
        and gamma is 1, it is what that missing value is on average over the policy's choices (V(s) = E[r + V(s')]).
        """
        if not self.bootstraps:
            return None
        assert rollouts.truncated is not None
        assert values is not None
        at = np.flatnonzero(rollouts.response_mask)
        after = np.searchsorted(at, rollouts.offsets)
        cut = np.flatnonzero(rollouts.truncated & (after[1:] > after[:-1]))
        following = np.zeros(len(rollouts), dtype=np.float32)
        following[cut] = values[at[after[cut + 1] - 1]]
        return following
