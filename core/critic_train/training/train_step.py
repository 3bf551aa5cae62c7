"""One optimizer step: a mini-batch's gradient, gathered over its micro-batches."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.fsdp import set_gradient_sync
from critic_train.model.microbatches import micro_batches
from critic_train.model.model_input import ModelInput
from critic_train.model.oom import attempts
from critic_train.rollouts import Rollouts
from critic_train.settings import LossAggMode
from critic_train.stopping import StopRequest
from critic_train.training.loss import share_of_tokens, token_weights, value_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRecipe:
    """How the loss is made: the settings of the Loss panel, resolved.

    Attributes:
        cliprange_value: eps; None for no clip.
        mode: the aggregation.
        scale_factor: the divisor of seq-mean-token-sum-norm.
    """

    cliprange_value: float | None
    mode: LossAggMode
    scale_factor: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a mini-batch was and gave. Shares are of its masked tokens."""

    value_loss: float
    clipfrac: float
    saturation: float
    vpred_mean: float
    response_tokens: int
    rollout_tokens: int
    computed_tokens: int


def accumulate_gradient(
    critic: Critic,
    rollouts: Rollouts,
    recipe: LossRecipe,
    compute: Compute,
    *,
    forest: bool,
    stop: StopRequest,
) -> StepResult | None:
    """Add the gradient of a whole mini-batch's loss to the critic's parameters.

    The weights of the loss come from the whole mini-batch's mask, so micro-batch losses add up and neither
    `max_tokens` nor packing nor the order of the rollouts changes the gradient (float rounding aside).

    Args:
        critic: on its device, gradients cleared.
        rollouts: the mini-batch; its `values` are V_old.
        recipe: the loss.
        compute: device, precision and token budget, which is halved where memory runs out: the mini-batch then starts
            again, and its gradient is the same.
        forest: lay rollouts out as a forest, or as padded rows.
        stop: looked at before every micro-batch.

    Returns:
        The mini-batch's figures, or None when asked to stop: the gradient is then incomplete.
    """
    weights = mini_batch_weights(rollouts, recipe)
    for attempt in attempts(critic, rollouts, compute):
        with attempt:
            return gradient_pass(critic, rollouts, recipe, compute, weights, forest=forest, stop=stop)
    raise AssertionError("attempts end by an error")


def gradient_pass(
    critic: Critic,
    rollouts: Rollouts,
    recipe: LossRecipe,
    compute: Compute,
    weights: NDArray[np.float32],
    *,
    forest: bool,
    stop: StopRequest,
    after_each: Callable[[NDArray[np.int64], torch.Tensor], None] | None = None,
) -> StepResult | None:
    """Forward and backward of every micro-batch, once; `accumulate_gradient` does it until it fits into memory.

    Args:
        critic: as there, and so are the others.
        rollouts: a mini-batch, or a part of one.
        recipe: the loss.
        compute: device, precision and token budget.
        weights: float32 [T], the weight of each token's loss in that of the whole mini-batch.
        forest: the layout.
        stop: looked at before every micro-batch.
        after_each: called after every micro-batch with int64 [M], the places of its response tokens, and its loss.
    """
    totals = torch.zeros(4, dtype=torch.float64)
    computed_tokens = 0
    for batch, last in marked(micro_batches(rollouts, compute, forest=forest)):
        if stop.look():
            return None
        set_gradient_sync((critic.trunk, critic.head), last=last or after_each is not None)
        with compute.autocast():
            values = critic(batch)
        part = value_loss(
            values,
            _column(rollouts.returns[batch.response_tokens], compute),
            None if rollouts.values is None else _column(rollouts.values[batch.response_tokens], compute),
            _column(weights[batch.response_tokens], compute),
            recipe.cliprange_value,
        )
        part.loss.backward()
        figures = (part.loss.detach(), part.clipped, part.saturated, values.detach().sum())
        totals += torch.stack([figure.double() for figure in figures]).cpu()
        computed_tokens += batch.computed_tokens
        if after_each is not None:
            after_each(batch.response_tokens, part.loss.detach())
    # Of several ranks each has gone through its share; the figures are the whole mini-batch's.
    response_tokens = int(rollouts.response_mask.sum())
    loss, clipped, saturated, summed, computed = compute.ranks.all_reduce_sum(
        torch.cat([totals, torch.tensor([computed_tokens], dtype=torch.float64)])
    ).tolist()
    return StepResult(
        value_loss=loss,
        clipfrac=share_of_tokens(clipped, response_tokens),
        saturation=share_of_tokens(saturated, response_tokens),
        vpred_mean=summed / response_tokens,
        response_tokens=response_tokens,
        rollout_tokens=len(rollouts.input_ids),
        computed_tokens=int(computed),
    )


def mini_batch_weights(rollouts: Rollouts, recipe: LossRecipe) -> NDArray[np.float32]:
    """float32 [T], the weight of each token's loss in that of a whole mini-batch."""
    per_rollout = token_weights(rollouts.response_counts, recipe.mode, recipe.scale_factor)
    return np.repeat(per_rollout, rollouts.lengths).astype(np.float32)


class NonFiniteError(ArithmeticError):
    """The loss or the gradient of a mini-batch is not finite; no step was taken."""


def apply_gradient(critic: Critic, optimizer: torch.optim.Optimizer, grad_clip: float, loss: float) -> float:
    """Clip the gradient, step, and clear it.

    Args:
        critic: with the gradient of a whole mini-batch.
        optimizer: with its learning rates set.
        grad_clip: the largest norm; 0 turns the clip off.
        loss: the mini-batch's loss, checked beside the gradient.

    Returns:
        The gradient's norm before the clip.

    Raises:
        NonFiniteError: the loss or the gradient is not finite. No step is taken, and the gradient is cleared.
    """
    norm = gradient_norm(critic, grad_clip or math.inf)
    if not math.isfinite(norm) or not math.isfinite(loss):
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(f"the loss is {loss:g} and the gradient norm {norm:g}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def gradient_norm(critic: Critic, largest: float = math.inf) -> float:
    """The norm of the critic's gradient, which is scaled down to `largest` where it is above it."""
    parameters = [p for p in critic.parameters() if p.grad is not None]
    return whole_number(torch.nn.utils.clip_grad_norm_(parameters, largest))


def marked(batches: Iterable[ModelInput]) -> Iterator[tuple[ModelInput, bool]]:
    """Each micro-batch, and whether it is the last."""
    before: ModelInput | None = None
    for batch in batches:
        if before is not None:
            yield before, False
        before = batch
    if before is not None:
        yield before, True


def whole_number(number: torch.Tensor) -> float:
    """A number of which, after sharding, every rank holds a part."""
    return float(number.full_tensor() if hasattr(number, "full_tensor") else number)


def _column(array: np.ndarray[tuple[int], np.dtype[np.float32]], compute: Compute) -> torch.Tensor:
    return torch.from_numpy(array).to(compute.device, non_blocking=True)
