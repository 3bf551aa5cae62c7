"""The steps that are compared."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForTokenClassification, PreTrainedConfig

from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.microbatches import micro_batches
from critic_train.rollouts import Rollouts
from critic_train.stopping import StopRequest
from critic_train.training.optimizer import build_optimizer
from critic_train.training.train_step import LossRecipe, accumulate_gradient, clip_gradient

EPS = 0.5
GRAD_CLIP = 1.0


def fit_step(critic: Critic, rollouts: Rollouts, compute: Compute, *, forest: bool = True) -> Callable[[], object]:
    """The step of `critic-train fit`, in a forest or in padded rows."""
    optimizer = build_optimizer(critic, lr=1e-5, head_lr=1e-4, weight_decay=0.01)
    recipe = LossRecipe(cliprange_value=EPS, mode="token-mean", scale_factor=None)
    stop = StopRequest()

    def step() -> None:
        result = accumulate_gradient(critic, rollouts, recipe, compute, forest=forest, stop=stop)
        norm = clip_gradient(critic, GRAD_CLIP)
        assert math.isfinite(norm + result.value_loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bare_pass(critic: Critic, rollouts: Rollouts, compute: Compute) -> Callable[[], object]:
    """Forward and backward of the whole trunk on the forest's tokens; layout, head, loss and optimizer left out."""
    batches = list(micro_batches(rollouts, compute, forest=True))
    for batch in batches:  # every layer whole
        batch.trunk_arguments["tree_plan"].needed = None
    width = critic.trunk.config.hidden_size
    slopes = [torch.randn(batch.computed_tokens, width, device=compute.device) for batch in batches]

    def step() -> None:
        for batch, slope in zip(batches, slopes, strict=True):
            with compute.autocast():
                hidden = critic.trunk(use_cache=False, **batch.trunk_arguments).last_hidden_state[0]
            hidden.backward(slope.to(hidden.dtype))
        critic.zero_grad(set_to_none=True)

    return step


def padded_step(config: PreTrainedConfig, rollouts: Rollouts, compute: Compute) -> Callable[[], object]:
    """What a user writes today: padded rows through transformers' token classifier."""
    config.num_labels = 1
    config.classifier_dropout = 0.0
    torch.manual_seed(0)
    device = compute.device
    model: Any = AutoModelForTokenClassification.from_config(config, attn_implementation="sdpa").to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
    columns = padded(rollouts, device)
    rows = max(1, compute.max_tokens // columns["seen"].shape[1])
    response_tokens = columns["mask"].sum()

    def step() -> None:
        for first in range(0, len(rollouts), rows):
            part = {name: column[first : first + rows] for name, column in columns.items()}
            with compute.autocast():
                logits = model(input_ids=part["ids"], attention_mask=part["seen"], use_cache=False).logits
            value = logits[:, :-1, 0].float()
            target, old = part["returns"][:, 1:], part["values"][:, 1:]
            clipped = old + (value - old).clamp(-EPS, EPS)
            worst = torch.maximum((value - target) ** 2, (clipped - target) ** 2)
            (0.5 * (worst * part["mask"][:, 1:]).sum() / response_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def padded(rollouts: Rollouts, device: torch.device) -> dict[str, torch.Tensor]:
    """The columns of some rollouts as rows padded on the right, [n, width] each."""
    lengths, width = rollouts.lengths, int(rollouts.lengths.max())
    values = rollouts.values
    assert values is not None
    flat: dict[str, np.ndarray[Any, Any]] = {
        "ids": rollouts.input_ids.astype(np.int64),
        "mask": rollouts.response_mask.astype(np.float32),
        "returns": rollouts.returns,
        "values": values,
    }
    seen = np.arange(width)[None] < lengths[:, None]
    columns = {"seen": torch.from_numpy(seen.astype(np.int64)).to(device)}
    for name, column in flat.items():
        table = np.zeros(seen.shape, dtype=column.dtype)
        table[seen] = column
        columns[name] = torch.from_numpy(table).to(device)
    return columns
