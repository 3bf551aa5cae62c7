"""A step of `fit` and a prediction on fake CUDA tensors; prints what the host read of the device, as JSON.

An operation that mixes devices or dtypes raises here, in a CPU build of torch.
"""

import json

import fake_device
import torch
from bench.drawing import Shape, draw
from support import small_config

from critic_train.model import microbatches
from critic_train.model.compute import Compute
from critic_train.model.last_layer import skip_unread_positions
from critic_train.model.memory import checkpoint_activations
from critic_train.stopping import StopRequest
from critic_train.training import train_step
from critic_train.training.optimizer import build_optimizer
from critic_train.weights.loading import build_critic

WAYS = [("varlen", "bf16", "selective", True), ("sdpa", "fp32", "layer", True), ("sdpa", "bf16", "none", False)]


def walk(attention: str, precision: str, checkpointing: str, forest: bool) -> dict[str, dict[str, int]]:
    """What the host reads in a step of two micro-batches or more, and in a prediction."""
    rollouts = draw(Shape("", 40, 20, 30, 2, 2), vocabulary=100)
    critic = build_critic(small_config("Qwen2"), seed=0).train()
    compute = Compute(device=torch.device("cuda", 0), precision=precision, max_tokens=100 if forest else 150)
    compute.attention = attention
    with fake_device.FakeDevice():
        fake_device.move(critic)
        if forest:
            skip_unread_positions(critic.trunk)
        else:
            critic.trunk.set_attn_implementation("sdpa")
        checkpoint_activations(critic, checkpointing)
        optimizer = build_optimizer(critic, lr=1e-5, head_lr=1e-3, weight_decay=0.0)
        recipe = train_step.LossRecipe(cliprange_value=0.5, mode="token-mean", scale_factor=None)
        with fake_device.counted_reads() as reads:
            train_step.accumulate_gradient(critic, rollouts, recipe, compute, forest=forest, stop=StopRequest())
            for name, parameter in critic.named_parameters():
                assert parameter.grad is not None, name
                assert (parameter.grad.device.type, parameter.grad.dtype) == ("cuda", torch.float32), name
            train_step.clip_gradient(critic, 1.0)
            optimizer.step()
            step = dict(reads)
        with fake_device.counted_reads() as reads:
            microbatches.predict_values(critic, rollouts, compute, forest=forest)
            return {"step": step, "prediction": dict(reads)}


if __name__ == "__main__":
    fake_device.pretend()
    microbatches.ahead = lambda items, depth: items  # a mode holds in one thread
    print(json.dumps({" ".join(map(str, way)): walk(*way) for way in WAYS}))
