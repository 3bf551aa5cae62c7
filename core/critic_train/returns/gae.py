"""Generalised advantage estimation over ragged columns, whole batches at once."""

import numpy as np
from numpy.typing import NDArray

from critic_train.rollouts import offsets_of

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
    with A_{m+1} = 0 and V_{m+1} the rollout's bootstrap. Tokens off the mask are no steps: the recursion goes on
    from the last response token before them to the first one after, as in verl's compute_gae_advantage_return, and
    whatever stands there (NaN included) is not read.

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
    w[offsets_of(counts)[1:][counts > 0] - 1] = 0.0
    reach, longest = 1, int(counts.max(initial=0))
    while reach < longest:
        x[:-reach] += w[:-reach] * x[reach:]
        w[:-reach] *= w[reach:]
        w[len(w) - reach :] = 0.0
        reach *= 2
    return x
