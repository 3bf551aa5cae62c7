"""Numbers are read from the device once a mini-batch, however many micro-batches it has.

On a GPU each reading waits for all that was launched. Here the readings are counted on a CPU: `Tensor.cpu()`, and what
item(), tolist(), float() and a condition go through.
"""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import branching_rollouts, small_config
from torch.utils._python_dispatch import TorchDispatchMode

from critic_train.model.compute import Compute
from critic_train.model.last_layer import skip_unread_positions
from critic_train.model.microbatches import micro_batches, predict_values
from critic_train.stopping import StopRequest
from critic_train.training.next_token_loss import add_next_token_head
from critic_train.training.train_step import LossRecipe, accumulate_gradient, clip_gradient
from critic_train.weights.loading import build_critic

ONE = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=10_000)
MANY = replace(ONE, max_tokens=60)
RECIPE = LossRecipe(cliprange_value=0.5, mode="token-mean", scale_factor=None)


@contextmanager
def host_reads(monkeypatch):
    """A count of what is read from tensors inside the block."""
    reads: Counter[str] = Counter()
    to_cpu = torch.Tensor.cpu

    class Scalars(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            reads["scalar"] += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    def counting(tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        reads["cpu"] += 1
        return to_cpu(tensor, *args, **kwargs)

    with monkeypatch.context() as patched, Scalars():
        patched.setattr(torch.Tensor, "cpu", counting)
        yield reads


def step_reads(compute: Compute, monkeypatch, *, lm_loss: bool) -> tuple[int, Counter[str]]:
    """(micro-batches, readings) of a step's gradient, norm and clip."""
    rollouts = branching_rollouts()
    critic = build_critic(small_config("Qwen3", head_dim=16), seed=3).train()
    assert skip_unread_positions(critic.trunk)
    recipe = RECIPE
    if lm_loss:
        ids = np.unique(rollouts.input_ids).astype(np.int64)
        add_next_token_head(critic, ids, compute, source=None, checkpoint=None, seed=0)
        recipe = replace(RECIPE, lm_loss_weight=0.1)
    with host_reads(monkeypatch) as reads:
        accumulate_gradient(critic, rollouts, recipe, compute, forest=True, stop=StopRequest())
        clip_gradient(critic, 1.0)
    return sum(1 for _ in micro_batches(rollouts, compute, forest=True)), reads


@pytest.mark.parametrize("lm_loss", [False, True])
def test_a_step_of_many_micro_batches_reads_no_more_than_one_of_one(lm_loss, monkeypatch):
    one, of_one = step_reads(ONE, monkeypatch, lm_loss=lm_loss)
    many, of_many = step_reads(MANY, monkeypatch, lm_loss=lm_loss)
    assert (one, many >= 4) == (1, True)
    assert of_many == of_one
    assert of_one["cpu"] == 1


def test_a_prediction_of_many_micro_batches_reads_no_more_than_one_of_one(monkeypatch):
    critic = build_critic(small_config("Qwen3", head_dim=16), seed=3)
    counts = []
    for compute in (ONE, MANY):
        with host_reads(monkeypatch) as reads:
            predict_values(critic, branching_rollouts(), compute, forest=True)
        counts.append(reads)
    assert counts[0] == counts[1]
    assert counts[0]["cpu"] == 1
