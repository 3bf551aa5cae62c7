"""The steps that are compared on a GPU, on one model: its critic is built once, on the device.

FLOP of a step: 6 N for each computed token, N being the parameters of the blocks' matrices (no embedding; a critic has
no vocabulary head), and 12 * layers * heads * head_dim for each pair of positions that is seen (two products forward,
twice that backward; a causal sequence of T tokens has T (T + 1) / 2 of them). Work that activation checkpointing does
again, and what the narrowed last layer leaves out, count for nothing either way; a prefix that stands in two
micro-batches counts twice in computed tokens and once in rollout tokens. MFU is against the data sheet's dense bf16
figure.
"""

import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, Qwen2Config

from bench.measuring import in_turn
from bench.steps import EPS, GRAD_CLIP, fit_step, padded_step
from critic_train.layers.prefix_tree import PrefixOrder, build_tree_layout
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.memory import checkpoint_activations, compile_layers
from critic_train.model.microbatches import forest_micro_batches
from critic_train.model.model_input import tree_input
from critic_train.model.oom import attempts
from critic_train.model.selfcheck import choose_packing
from critic_train.rollouts import Rollouts
from critic_train.settings import ActivationCheckpointing, Attention
from critic_train.training.loss import token_weights, value_loss
from critic_train.training.optimizer import build_optimizer
from critic_train.training.train_step import clip_gradient
from critic_train.weights.loading import build_critic

SHAPES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
MODELS = {
    "tiny": (64, 2, 2, 1, 128),
    "0.5B": (896, 24, 14, 2, 4864),
    "1.5B": (1536, 28, 12, 2, 8960),
    "7B": (3584, 28, 28, 4, 18944),
}
"""Those of Qwen2.5."""
VOCABULARY = 151_936
KEPT = {
    "none": "kept",
    "tiles": "kept but for MLPs and norms",
    "selective": "half computed again",
    "layer": "computed again",
    "layer-tiles": "computed again in tiles",
}
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bf16, from the data sheets; SXM."""


def shape_config(model: str, vocabulary: int = VOCABULARY) -> Qwen2Config:
    """A configuration of one of MODELS."""
    shape = dict(zip(SHAPES, MODELS[model], strict=True))
    return Qwen2Config(**shape, vocab_size=vocabulary, max_position_embeddings=131_072)


def critic_on_device(config: PreTrainedConfig, device: torch.device, rollouts: Rollouts) -> Critic:
    """A critic with random weights, which are drawn on the device, for rollouts laid out as prefix trees."""
    with torch.device(device):
        critic = build_critic(config, seed=0).train()
    choose_packing(critic, rollouts.take(np.arange(2)), "forest")
    return critic


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a step is taken.

    Attributes:
        activations: what is kept of them for the backward pass.
        max_tokens: positions at once.
        compiled: whether layers are.
    """

    activations: ActivationCheckpointing = "none"
    max_tokens: int
    compiled: bool = False


@dataclass
class GpuSteps:
    """Steps of one model on some rollouts.

    Attributes:
        config: of the model.
        rollouts: one mini-batch.
        device: where.
        attention: the kernel of the fit and the flat step.
        rounds: how often each is timed.
        critic: of the fit and the flat step; None once it was given up for the padded one.
    """

    config: Qwen2Config
    rollouts: Rollouts
    device: torch.device
    attention: Attention
    rounds: int
    critic: Critic | None = None

    def measured(self, name: str, way: Way) -> dict[str, Any]:
        """Seconds of one kind of step, fit, flat or padded, and what follows from them."""
        compute = Compute(device=self.device, precision="bf16", max_tokens=way.max_tokens, attention=self.attention)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        seconds = statistics.median(self._seconds(name, way, compute))
        positions, pairs = computed(name, self.rollouts, compute.max_tokens)
        rate = flop(self.config, positions, pairs) / seconds / 1e12
        peak = peak_tflops(self.device)
        kernel = self.attention if name != "padded" else "sdpa"
        return {
            "step": f"{name}, {kernel}" + (", compiled" if way.compiled else ""),
            "seconds": seconds,
            "activations": f"{KEPT[way.activations]}, {compute.max_tokens:,} at once",
            "peak GB": torch.cuda.max_memory_allocated(self.device) / 1e9,
            "reserved GB": torch.cuda.max_memory_reserved(self.device) / 1e9,
            "rollout tok/s": len(self.rollouts.input_ids) / seconds,
            "computed tok/s": positions / seconds,
            "TFLOP/s": rate,
            "MFU": rate / peak if peak else None,
        }

    def _seconds(self, name: str, way: Way, compute: Compute) -> list[float]:
        step: Callable[[], object]
        if name == "padded":
            self.critic = None
            gc.collect()
            with torch.device(self.device):
                step = padded_step(self.config, self.rollouts, compute)
        else:
            self.critic = self.critic or critic_on_device(self.config, self.device, self.rollouts)
            checkpoint_activations(self.critic, "none")
            checkpoint_activations(self.critic, way.activations)
            if way.compiled:
                torch.compiler.reset()  # what was compiled for another model would count against the limit of variants
                compile_layers(self.critic)
            step = (fit_step if name == "fit" else flat_step)(self.critic, self.rollouts, compute)
        seconds = in_turn({name: step}, self.rounds, self.device)[name]
        if self.critic is not None:
            self.critic.zero_grad(set_to_none=True)
            if way.compiled:
                self.critic = None
        return seconds


def flop(config: Qwen2Config, positions: int, pairs: float) -> float:
    """Of a step; see the module."""
    hidden, layers, inner = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    shared = config.num_key_value_heads / config.num_attention_heads
    matrices = layers * (2 * hidden * hidden * (1 + shared) + 3 * hidden * inner)
    return float(6 * matrices * positions + 12 * layers * hidden * pairs)


def computed(name: str, rollouts: Rollouts, max_tokens: int) -> tuple[int, float]:
    """Positions of a step and pairs of them that are seen."""
    lengths = rollouts.lengths.astype(np.float64)
    if name != "fit":
        return len(rollouts.input_ids), float((lengths * (lengths + 1) / 2).sum())
    layouts = [build_tree_layout(rollouts, order) for order in forest_micro_batches(rollouts, max_tokens)]
    return sum(len(layout) for layout in layouts), sum(pairs_of(layout.depth) for layout in layouts)


def pairs_of(depth: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    """Pairs of positions that are seen: each position sees its ancestors and itself."""
    return float((depth + 1).sum())


def flat_step(critic: Critic, rollouts: Rollouts, compute: Compute) -> Callable[[], object]:
    """The same step with every rollout by itself: packed without padding, nothing shared."""
    optimizer = build_optimizer(critic, lr=1e-5, head_lr=1e-4, weight_decay=0.01)
    per_rollout = token_weights(rollouts.response_counts, "token-mean", None)
    weights = np.repeat(per_rollout, rollouts.lengths).astype(np.float32)
    values = rollouts.values
    assert values is not None

    def gradient() -> float:
        at_once = max(1, compute.max_tokens // int(rollouts.lengths.max()))
        losses = []
        for first in range(0, len(rollouts), at_once):
            index = np.arange(first, min(first + at_once, len(rollouts)))
            order = PrefixOrder(index=index, shared=np.zeros(len(index), dtype=np.int64))
            batch = tree_input(rollouts, order, compute.device, compute.attention)
            columns = (rollouts.returns, values, weights)
            target, old, weight = (torch.from_numpy(c[batch.response_tokens]).to(compute.device) for c in columns)
            with compute.autocast():
                predicted = critic(batch)
            part = value_loss(predicted, target, old, weight, EPS)
            part.loss.backward()
            losses.append(part.loss.detach())
        return float(torch.stack(losses).sum())

    def step() -> None:
        for attempt in attempts(critic, rollouts, compute):
            with attempt:
                loss = gradient()
                break
        norm = clip_gradient(critic, GRAD_CLIP)
        assert math.isfinite(norm + loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak_tflops(device: torch.device) -> float | None:
    """The data sheet's figure; None for a device that is not in the list."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
