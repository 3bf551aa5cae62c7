"""PPO's clipped value loss, split over micro-batches without changing its value or its gradient.

    L = 0.5 * agg( max( (V - G)^2, (clip(V, V_old - eps, V_old + eps) - G)^2 ) )

Every aggregation is a weighted sum over the masked tokens of a mini-batch. The weights depend on the mask alone, so
they are known before any micro-batch runs, and the micro-batch losses simply add up: the result is the same for any
packing, order or number of micro-batches. Modes and their meaning are verl's (`compute_value_loss` and `agg_loss`,
verl 0.9.1).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from critic_train.settings import LossAggMode

VERL_GUARD = 1e-8
"""verl adds this to the token counts it divides by (a rollout's in seq-mean-token-mean, clipfrac's); kept, so that
both agree to 1e-12."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueLoss:
    """What one micro-batch adds to the mini-batch.

    Attributes:
        loss: 0-d tensor with a gradient; the mini-batch's loss is the sum over its micro-batches.
        clipped: number of tokens on which the clipped loss is strictly the larger (clipfrac's numerator).
        saturated: number of tokens whose gradient the clip has zeroed.
    """

    loss: Tensor
    clipped: Tensor
    saturated: Tensor


def token_weights(
    response_counts: NDArray[np.int64], mode: LossAggMode, scale_factor: float | None = None
) -> NDArray[np.float64]:
    """The weight of every masked token of a mini-batch, one number per rollout.

    Args:
        response_counts: int64 [n], masked tokens of each rollout of the whole mini-batch (over all ranks). Rollouts
            without any count for nothing, as in verl.
        mode: the aggregation.
        scale_factor: the divisor of seq-mean-token-sum-norm (verl's default, the padded response length, does not
            exist in a forest).

    Returns:
        float64 [n]; a masked token of rollout i weighs entry i. 0 for a rollout without masked tokens.
    """
    counts = response_counts.astype(np.float64)
    rollouts = float(max(1, (response_counts > 0).sum()))
    if mode == "token-mean":
        weights = np.full(len(counts), 1.0 / max(1.0, counts.sum()))
    elif mode == "token-sum":
        weights = np.ones(len(counts))
    elif mode == "seq-mean-token-sum":
        weights = np.full(len(counts), 1.0 / rollouts)
    elif mode == "seq-mean-token-mean":
        weights = 1.0 / (rollouts * (counts + VERL_GUARD))
    else:
        assert scale_factor is not None, "settings hold that this mode comes with a factor"
        weights = np.full(len(counts), 1.0 / (rollouts * scale_factor))
    return np.where(response_counts > 0, weights, 0.0)


def value_loss(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None,
    weights: Tensor,
    cliprange_value: float | None,
) -> ValueLoss:
    """The clipped value loss of some masked tokens.

    Args:
        values: float32 [M], V, with a gradient.
        returns: float [M], G.
        old_values: float [M], V_old; None turns the clip off.
        weights: float [M], from `token_weights`.
        cliprange_value: eps; None turns the clip off.

    Returns:
        The loss and the two counts. A clipped token keeps its loss; its gradient is zero exactly where the clip is
        active (|V - V_old| > eps) and the clipped loss is the larger: that is `saturated`.
    """
    squared = (values - returns).square()
    assert cliprange_value is None or old_values is not None, "a clip needs old values"
    if old_values is None or cliprange_value is None:
        zero = torch.zeros((), dtype=torch.int64, device=values.device)
        return ValueLoss(loss=0.5 * (weights * squared).sum(), clipped=zero, saturated=zero)
    clipped_values = torch.maximum(torch.minimum(values, old_values + cliprange_value), old_values - cliprange_value)
    squared_clipped = (clipped_values - returns).square()
    worse = squared_clipped > squared
    loss = 0.5 * (weights * torch.maximum(squared, squared_clipped)).sum()
    outside = (values < old_values - cliprange_value) | (values > old_values + cliprange_value)
    return ValueLoss(loss=loss, clipped=worse.sum(), saturated=(worse & outside).sum())


def share_of_tokens(count: float, response_tokens: int) -> float:
    """A count of masked tokens as a share of all of them (clipfrac, saturation), guarded as verl's masked mean is."""
    return count / (response_tokens + VERL_GUARD)
