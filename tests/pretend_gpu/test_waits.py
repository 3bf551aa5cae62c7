"""How often the host waits for a pretended GPU in a step and in a prediction, and that it copies from pinned memory.

Run in an environment that build.py made: `ENV/pretend-gpu python -m pytest -m pretend_gpu tests/pretend_gpu`.
"""

from dataclasses import replace

import pytest
import torch
from pretend_gpu_work import ON_THE_PRETENDED_GPU
from support import rollouts_of
from transformers import Qwen3Config

from critic_train.layers.attention import TREE_ATTENTION
from critic_train.model.compute import Compute
from critic_train.model.last_layer import skip_unread_positions
from critic_train.model.microbatches import micro_batches, predict_values
from critic_train.rollouts import Rollouts
from critic_train.stopping import StopRequest
from critic_train.training.optimizer import build_optimizer
from critic_train.training.train_step import LossRecipe, accumulate_gradient, clip_gradient
from critic_train.weights.loading import build_critic

pytestmark = ON_THE_PRETENDED_GPU

MICRO_BATCHES = 8
GPU = Compute(device=torch.device("cuda", 0), precision="bf16", max_tokens=700)
RECIPE = LossRecipe(cliprange_value=0.5, mode="token-mean", scale_factor=None)
WAITING = ("stream_sync", "event_sync", "device_sync")


def rollouts() -> Rollouts:
    """Eight prompts of 200 tokens with four responses each, of 64 tokens and fewer."""
    sequences = []
    for prompt in range(MICRO_BATCHES):
        draw = torch.Generator().manual_seed(prompt)
        first = torch.randint(1, 1000, (200,), generator=draw)
        sequences += [torch.cat([first, torch.randint(1, 1000, (64 - 8 * n,), generator=draw)]) for n in range(4)]
    return rollouts_of([sequence.int().numpy() for sequence in sequences], [200] * len(sequences))


def critic_on_the_device(*, forest: bool):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    critic = build_critic(Qwen3Config(**sizes, head_dim=64, num_hidden_layers=3, vocab_size=1000), seed=0)
    if forest:
        critic.trunk.set_attn_implementation(TREE_ATTENTION)
        skip_unread_positions(critic.trunk)
    else:
        critic.trunk.set_attn_implementation("sdpa")
    return critic.to(GPU.device).train()


@pytest.fixture
def counted():
    """Counts what the device is asked to do; cuDNN is not there."""
    from tests.pretend_gpu.counts import Watch

    torch.backends.cuda.enable_cudnn_sdp(False)
    return Watch()


def compute_of(attention: str) -> Compute:
    return replace(GPU, max_tokens=1100) if attention == "rows" else replace(GPU, attention=attention)


def waits(watch) -> dict[str, int]:
    """Function of critic-train -> how often the host waited there until the device was through."""
    return {where: count for (kind, where), count in watch.waits.items() if kind in WAITING}


@pytest.mark.parametrize("attention", ["varlen", "flex", "sdpa", "rows"])
def test_a_step_waits_for_its_figures_and_its_norm_alone(attention, counted):
    forest, compute = attention != "rows", compute_of(attention)
    critic, data, stop = critic_on_the_device(forest=forest), rollouts(), StopRequest()
    optimizer = build_optimizer(critic, lr=1e-5, head_lr=1e-4, weight_decay=0.01)
    assert sum(1 for _ in micro_batches(data, compute, forest=forest)) == MICRO_BATCHES

    def step() -> None:
        accumulate_gradient(critic, data, RECIPE, compute, forest=forest, stop=stop)
        clip_gradient(critic, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # the moments are made, kernels compiled
    with counted:
        step()
    ours = waits(counted)
    if not forest:
        ours.pop("model/critic.py:hidden")  # transformers asks twice whether a mask is needed
    assert ours == {"training/train_step.py:gradient_pass": 1, "training/train_step.py:clip_gradient": 1}
    assert "h2d_pageable" not in counted.counts


@pytest.mark.parametrize("attention", ["varlen", "flex"])
def test_a_prediction_waits_once(attention, counted):
    compute = compute_of(attention)
    critic, data = critic_on_the_device(forest=True).eval(), rollouts()
    predict_values(critic, data, compute, forest=True)
    with counted:
        predict_values(critic, data, compute, forest=True)
    assert waits(counted) == {"model/microbatches.py:predict_in_parts": 1}
    assert "h2d_pageable" not in counted.counts
