"""The gradient of one optimizer step: that of a mini-batch, accumulated over its micro-batches.

Returns of any size train alike. With s the scale of the returns (`return_scale`), the optimizer works on standardised
values z = (V - c) / s, c being the mean return with which the bias of a new head begins:

    loss / s^2 = 0.5 * agg( (z - (G - c) / s)^2 )      V = W h + B = s (w h + b) + c,      w = W / s

The head keeps W and B, so that a checkpoint holds plain values and nothing is converted when it is saved, resumed or
loaded elsewhere. What changes is its update: the gradient by w is s times the one by W, and where w moves by d, W moves
by s d. So the loss is divided by s^2, the head's gradient multiplied by s (`accumulate_gradient`), and so is its
learning rate (`optimizer.build_optimizer`). Gradient norms, AdamW's moments and its epsilon are then those of returns
of scale 1, whatever the unit of the returns; the clip around V_old and all figures stay in that unit.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from critic_train.layers.to_device import to_device
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.fsdp import set_gradient_sync
from critic_train.model.microbatches import micro_batches
from critic_train.model.model_input import ModelInput
from critic_train.model.oom import attempts
from critic_train.rollouts import Rollouts
from critic_train.settings import LossAggMode, LossSettings
from critic_train.stopping import StopRequest
from critic_train.training.loss import share_of_tokens, token_weights, value_loss
from critic_train.training.next_token_loss import tokens_ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRecipe:
    """How the loss is made: the settings of the Loss panel, resolved.

    Attributes:
        cliprange_value: eps; None for no clip.
        mode: the aggregation.
        scale_factor: the divisor of seq-mean-token-sum-norm.
        return_scale: of the returns; the gradient is that of the loss in units of its square.
        lm_loss_weight: of the next-token loss, whose tokens weigh among each other as the value loss's do.
        lm_loss_ahead: the most response tokens that a state predicts.
    """

    cliprange_value: float | None
    mode: LossAggMode
    scale_factor: float | None
    return_scale: float = 1.0
    lm_loss_weight: float = 0.0
    lm_loss_ahead: int = 1

    @classmethod
    def of(cls, settings: LossSettings, return_scale: float = 1.0) -> "LossRecipe":
        """The loss that the settings ask for."""
        clip = None if settings.no_clip or settings.old_values == "none" else settings.cliprange_value
        return cls(
            cliprange_value=clip,
            mode=settings.loss_agg_mode,
            scale_factor=settings.loss_scale_factor,
            return_scale=return_scale,
            lm_loss_weight=settings.lm_loss_weight or 0.0,
            lm_loss_ahead=settings.lm_loss_ahead or 1,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Figures of a mini-batch.

    Attributes:
        value_loss: its loss.
        clipfrac: share of its masked tokens whose clipped loss is the larger.
        saturation: share of its masked tokens whose gradient the clip zeroes.
        vpred_mean: mean predicted value of its masked tokens.
        response_tokens: masked tokens.
        rollout_tokens: tokens of all rollouts.
        computed_tokens: positions that went through the model, padding included, over all ranks.
        lm_loss: its next-token loss, before the weight; None where there is none.
    """

    value_loss: float
    clipfrac: float
    saturation: float
    vpred_mean: float
    response_tokens: int
    rollout_tokens: int
    computed_tokens: int
    lm_loss: float | None = None


def accumulate_gradient(
    critic: Critic,
    rollouts: Rollouts,
    recipe: LossRecipe,
    compute: Compute,
    *,
    forest: bool,
    stop: StopRequest,
) -> StepResult:
    """Take the gradient of a whole mini-batch's loss, of the standardised critic where the recipe has a scale.

    The weights of the loss come from the whole mini-batch's mask, so micro-batch losses add up and neither
    `max_tokens` nor packing nor the order of the rollouts changes the gradient (float rounding aside).

    Args:
        critic: on its device, gradients cleared.
        rollouts: the mini-batch; its `values` are V_old.
        recipe: the loss.
        compute: device, precision and token budget, which is halved where memory runs out: the mini-batch then starts
            again, and its gradient is the same.
        forest: lay rollouts out as a forest, or as padded rows.
        stop: checked before every micro-batch.

    Returns:
        The mini-batch's figures.

    Raises:
        Stopped: asked to stop; the gradient is incomplete.
        MachineError: there is not memory enough for a single rollout.
    """
    weights = mini_batch_weights(rollouts, recipe)
    for attempt in attempts(critic, rollouts, compute):
        with attempt:
            result = gradient_pass(critic, rollouts, recipe, compute, weights, forest=forest, stop=stop)
            for parameter in critic.head.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(recipe.return_scale)
            return result
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
) -> StepResult:
    """Forward and backward of every micro-batch, once. `accumulate_gradient` repeats it where memory runs out.

    Args:
        critic: on its device, gradients cleared.
        rollouts: a mini-batch, or a part of one.
        recipe: the loss.
        compute: device, precision and token budget.
        weights: float32 [T], the weight of each token's loss in that of the whole mini-batch.
        forest: lay rollouts out as a forest, or as padded rows.
        stop: checked before every micro-batch.
        after_each: called after every micro-batch with int64 [M], its response tokens among the T, and its loss.

    Raises:
        Stopped: asked to stop.
    """
    totals, computed_tokens = torch.zeros(5, dtype=torch.float64, device=compute.device), 0  # read once, at the end
    for batch, last in mark_last(micro_batches(rollouts, compute, forest=forest)):
        stop.check_on_all_ranks()
        set_gradient_sync(critic.parts, last=last or after_each is not None)
        with compute.autocast():
            values, lm_loss = _forward(critic, batch, rollouts, weights, recipe.lm_loss_ahead, compute)
        tokens = batch.response_tokens
        part = value_loss(
            values,
            to_device(rollouts.returns[tokens], compute.device),
            None if rollouts.values is None else to_device(rollouts.values[tokens], compute.device),
            to_device(weights[tokens], compute.device),
            recipe.cliprange_value,
        )
        (loss := part.loss / recipe.return_scale**2 + recipe.lm_loss_weight * lm_loss).backward()
        figures = (part.loss.detach(), part.clipped, part.saturated, values.detach().sum(), lm_loss.detach())
        totals += torch.stack([figure.double() for figure in figures])
        computed_tokens += batch.computed_tokens
        if after_each is not None:
            after_each(tokens, loss.detach())
    # Each rank has gone through its share of the mini-batch; the figures are those of all of it.
    response_tokens = int(rollouts.response_mask.sum())
    totals = torch.cat([totals.cpu(), torch.tensor([computed_tokens], dtype=torch.float64)])
    loss_sum, clipped, saturated, summed, lm_sum, computed = compute.ranks.all_reduce_sum(totals).tolist()
    return StepResult(
        value_loss=loss_sum,
        clipfrac=share_of_tokens(clipped, response_tokens),
        saturation=share_of_tokens(saturated, response_tokens),
        vpred_mean=summed / response_tokens,
        response_tokens=response_tokens,
        rollout_tokens=len(rollouts.input_ids),
        computed_tokens=int(computed),
        lm_loss=None if critic.next_token_head is None else lm_sum,
    )


def _forward(
    critic: Critic,
    batch: ModelInput,
    rollouts: Rollouts,
    weights: NDArray[np.float32],
    lm_loss_ahead: int,
    compute: Compute,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [M], the micro-batch's part of the next-token loss: 0 where the critic has no head for it)."""
    head = critic.next_token_head
    if head is None:
        return critic(batch), torch.zeros((), device=compute.device)
    states, tokens = critic.hidden(batch), batch.response_tokens
    state_index, weight, predicted = batch.value_index_on_host, weights[tokens], tokens
    if lm_loss_ahead > 1:
        origin, predicted, share = tokens_ahead(rollouts, tokens, lm_loss_ahead)
        state_index, weight = state_index[origin], weight[origin] * share
    lm_loss = head(states, state_index, head.labels(rollouts.input_ids[predicted]), weight)
    return critic.values(states, batch), lm_loss


def mini_batch_weights(rollouts: Rollouts, recipe: LossRecipe) -> NDArray[np.float32]:
    """float32 [T], the weight of each token's loss in that of a whole mini-batch."""
    per_rollout = token_weights(rollouts.response_counts, recipe.mode, recipe.scale_factor)
    return np.repeat(per_rollout, rollouts.lengths).astype(np.float32)


def clip_gradient(critic: Critic, grad_clip: float) -> float:
    """Scale the critic's gradient down to a norm of `grad_clip` where it is larger; 0 turns the clip off.

    Returns:
        The norm before the clip.
    """
    parameters = [p for p in critic.parameters() if p.grad is not None]
    norm: Any = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    # Of sharded parameters the norm is a DTensor, of which each rank holds a part.
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def mark_last(batches: Iterable[ModelInput]) -> Iterator[tuple[ModelInput, bool]]:
    """(micro-batch, whether it is the last one)."""
    before: ModelInput | None = None
    for batch in batches:
        if before is not None:
            yield before, False
        before = batch
    if before is not None:
        yield before, True
