"""Returns and advantages from rewards: Monte-Carlo sums and generalised advantage estimation over ragged columns."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from critic_train.rollouts import Rollouts, offsets_from_lengths
from critic_train.settings import AUTO, Returns, ReturnsSettings, Truncated

Floats = NDArray[np.float64]


def gae(
    rewards: NDArray[np.floating],
    values: NDArray[np.floating],
    response_mask: NDArray[np.bool_],
    offsets: NDArray[np.int64],
    *,
    gamma: float,
    lam: float | NDArray[np.floating],
    bootstrap: NDArray[np.floating] | None = None,
) -> tuple[Floats, Floats]:
    """Advantages and lambda-returns of every response token (Schulman et al. 2016, arXiv 1506.02438).

    Over the response tokens t = 1..m of one rollout, computed in float64:
        delta_t = r_t + gamma * V_{t+1} - V_t          A_t = delta_t + gamma * lam * A_{t+1}          G_t = A_t + V_t
    with A_{m+1} = 0 and V_{m+1} the rollout's bootstrap. Tokens off the mask are skipped: the recursion goes on
    from the last response token before them to the first one after, as in verl's compute_gae_advantage_return, and
    their entries (NaN included) are not read.

    A rollout's figures depend on nothing but the rollout, to the bit: not on what else is in the batch.

    Args:
        rewards: float [T].
        values: float [T], V of the state in which each token is chosen.
        response_mask: bool [T].
        offsets: int64 [n+1]; rollout i owns tokens offsets[i]:offsets[i+1].
        gamma: discount, in [0, 1].
        lam: lambda in [0, 1], one for all or float [n], one a rollout.
        bootstrap: float [n], the value of the state after the last response token; None where all rollouts end
            there, so that nothing follows.

    Returns:
        (advantages, returns), float64 [T], 0 off the mask.
    """
    at = np.flatnonzero(response_mask)
    bounds = np.searchsorted(at, offsets)
    counts = np.diff(bounds)
    v = values[at].astype(np.float64)
    ends = bounds[1:][counts > 0] - 1
    # What follows each token's state: the next response token's value, or the bootstrap.
    after = np.append(v[1:], 0.0)[: len(v)]
    after[ends] = 0.0 if bootstrap is None else bootstrap[counts > 0].astype(np.float64)
    delta = rewards[at].astype(np.float64) + gamma * after - v
    decay = np.repeat(np.broadcast_to(gamma * np.asarray(lam, dtype=np.float64), counts.shape), counts)
    advantage = suffix_sums(delta, decay, counts)
    advantages, returns = np.zeros(len(response_mask)), np.zeros(len(response_mask))
    advantages[at], returns[at] = advantage, advantage + v
    return advantages, returns


def monte_carlo(
    rewards: NDArray[np.floating],
    response_mask: NDArray[np.bool_],
    offsets: NDArray[np.int64],
    *,
    gamma: float,
    bootstrap: NDArray[np.floating] | None = None,
) -> Floats:
    """Discounted sums of the rewards to come: GAE's returns at lambda 1, for which no values are needed.

    Args and result as for `gae`.

    Returns:
        returns, float64 [T], 0 off the mask: G_t = r_t + gamma * G_{t+1}, with G_{m+1} the rollout's bootstrap.
    """
    at = np.flatnonzero(response_mask)
    bounds = np.searchsorted(at, offsets)
    counts = np.diff(bounds)
    steps = rewards[at].astype(np.float64)
    if bootstrap is not None:
        steps[bounds[1:][counts > 0] - 1] += gamma * bootstrap[counts > 0].astype(np.float64)
    returns = np.zeros(len(response_mask))
    returns[at] = suffix_sums(steps, np.full(len(steps), gamma, dtype=np.float64), counts)
    return returns


def suffix_sums(terms: Floats, decay: Floats, counts: NDArray[np.int64]) -> Floats:
    """The recurrence x_t = terms_t + decay_t * x_{t+1} within each row, by recursive doubling.

    After k rounds every x_t holds its first 2^k terms and w_t the weight of the next one (Hillis & Steele 1986), so
    the longest row decides the number of rounds and none of it is a loop over tokens.

    Args:
        terms: float64 [T], rows end to end.
        decay: float64 [T].
        counts: int64 [n], length of each row.

    Returns:
        float64 [T].
    """
    x, w = terms.copy(), decay.copy()
    # Nothing follows a row's last element.
    w[offsets_from_lengths(counts)[1:][counts > 0] - 1] = 0.0
    reach, longest = 1, int(counts.max(initial=0))
    while reach < longest:
        x[:-reach] += w[:-reach] * x[reach:]
        w[:-reach] *= w[reach:]
        w[len(w) - reach :] = 0.0
        reach *= 2
    return x


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
        truncated: how truncated rollouts are treated.
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
        """Whether a truncated rollout's last value replaces the rewards that would have followed."""
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
        """The same rollouts with their returns, float32 [T], put in. Args as for `returns`."""
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
        """float32 [n]: the value after the last response token; 0 where the rollout ended by itself.

        For a truncated rollout it is V of its last response token's state, the last value there is: shards hold values
        of states in which a token was chosen, and none was chosen in the next one. With gamma 1 and no reward in
        between it is the expectation of the missing value over the policy's choices (V(s) = E[r + V(s')]).
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
