"""What a GPU is made to do: TFLOP/s and MFU of a fit step, beside the flat variable-length step and the padded step.

Qwen2.5-shaped models with random weights, bf16, one prompt with eight responses, half of a sequence each.

FLOP of a step: 6 N for each computed token, N being the parameters of the blocks' matrices (no embedding; a critic has
no vocabulary head), and 12 * layers * heads * head_dim for each pair of positions that is seen (two products forward,
twice that backward; a causal sequence of T tokens has T (T + 1) / 2 of them). Work that activation checkpointing does
again, and what the narrowed last layer leaves out, count for nothing either way; a prefix that stands in two
micro-batches counts twice in computed tokens and once in rollout tokens.
Where a micro-batch's activations do not fit, the fit and the flat step are taken in three ways: layers computed again,
half of their products computed again (selective), and smaller micro-batches that keep all; each by itself. The best
of them is then compiled.
MFU is against the data sheet's dense bf16 figure. No figure was printed by this file yet: it has not met a GPU.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config

from bench.drawing import Shape, draw
from bench.entry import Options, Table
from bench.measuring import in_turn
from bench.steps import EPS, GRAD_CLIP, fit_step, padded_step
from critic_train.layers.attention_kernel import AttentionCall
from critic_train.layers.kernel_choice import choose_attention
from critic_train.layers.prefix_tree import PrefixOrder, build_tree_layout, prefix_order
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.memory import checkpoint_activations, compile_layers
from critic_train.model.microbatches import forest_micro_batches
from critic_train.model.model_input import tree_input
from critic_train.model.oom import attempts
from critic_train.model.selfcheck import KERNEL_TOKENS, choose_packing
from critic_train.model.trial import cut
from critic_train.rollouts import Rollouts
from critic_train.settings import ActivationCheckpointing
from critic_train.training.loss import token_weights, value_loss
from critic_train.training.optimizer import build_optimizer
from critic_train.training.train_step import clip_gradient
from critic_train.weights.loading import build_critic

NAME = "gpu"
TITLE = "A fit step on a GPU, beside the flat and the padded step"
DEVICES = ("cuda",)

VOCABULARY = 32_768
SHAPES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
MODELS = {"0.5B": (896, 24, 14, 2, 4864), "1.5B": (1536, 28, 12, 2, 8960), "tiny": (64, 2, 2, 1, 128)}
RUNS = {
    "quick": [("tiny", 64)],
    "usual": [("0.5B", 2048), ("1.5B", 2048)],
    "full": [("0.5B", 2048), ("0.5B", 8192), ("1.5B", 2048), ("1.5B", 8192)],
}
MAX_TOKENS = 40_960
KEPT_BYTES = 40 * 2**30
"""Room for activations beside weights, gradients and moments."""
CHECKPOINTING: tuple[ActivationCheckpointing, ...] = ("layer", "selective")
KEPT = {"none": "kept", "selective": "half computed again", "layer": "computed again"}
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bf16, from the data sheets; SXM."""


def run(options: Options) -> Table:
    """Every model at every length."""
    table = Table(
        columns={
            "model": "",
            "sequence": ",",
            "step": "",
            "rollout tok/s": ",.0f",
            "computed tok/s": ",.0f",
            "TFLOP/s": ".1f",
            "MFU": ".1%",
            "fit/this": ".2f",
            "activations": "",
            "peak GB": ".1f",
        },
        notes=["rollout tok/s counts every rollout's tokens; fit/this is the ratio of rollout tok/s to the best fit"],
    )
    for model, length in RUNS[options.size]:
        table.rows += measure(model, length, options)
    return table


def measure(model: str, length: int, options: Options) -> list[dict[str, Any]]:
    """The steps one after another, each with a model of its own: two do not fit beside each other."""
    config = Qwen2Config(
        **dict(zip(SHAPES, MODELS[model], strict=True)), vocab_size=VOCABULARY, max_position_embeddings=32_768
    )
    rollouts = draw(Shape("", length // 2, length // 2, length // 2), vocabulary=VOCABULARY)
    compute = Compute(device=options.device, precision="bf16", max_tokens=MAX_TOKENS)
    few = cut(rollouts, KERNEL_TOKENS)
    call = AttentionCall(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        key_size=config.hidden_size // config.num_attention_heads,
        value_size=config.hidden_size // config.num_attention_heads,
    )
    compute.attention, passed = choose_attention(
        "auto", [call], build_tree_layout(few, prefix_order(few)), options.device, "bf16"
    )
    rows = []
    for name in ("fit", "flat", "padded"):
        tried = [
            (way, measured(name, way, config, rollouts, compute, options))
            for way in ways(name, config, computed(name, rollouts, MAX_TOKENS)[0])
        ]
        if name != "padded":  # the best of them once more, compiled, which selective checkpoints cannot be
            able = [each for each in tried if each[0].activations != "selective"]
            way = replace(max(able, key=lambda each: each[1]["rollout tok/s"])[0], compiled=True)
            tried.append((way, measured(name, way, config, rollouts, compute, options)))
        rows += [{"model": model, "sequence": length, "passed over": passed, **row} for _, row in tried]
    best = max(row["rollout tok/s"] for row in rows if row["step"].startswith("fit"))
    for row in rows:
        row["fit/this"] = best / row["rollout tok/s"]
    return rows


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


def ways(name: str, config: Qwen2Config, positions: int) -> list[Way]:
    """What to try for one kind of step."""
    if name == "padded":
        return [Way(max_tokens=MAX_TOKENS // 4)]
    layer = 8 * config.hidden_size + 2 * (6 * config.hidden_size + 4 * config.intermediate_size)
    fits = int(KEPT_BYTES // (config.num_hidden_layers * layer))
    if fits >= min(positions, MAX_TOKENS):
        return [Way(max_tokens=MAX_TOKENS)]
    again = [Way(activations=kind, max_tokens=MAX_TOKENS) for kind in CHECKPOINTING]
    return [*again, Way(max_tokens=fits)]


def measured(
    name: str, way: Way, config: Qwen2Config, rollouts: Rollouts, compute: Compute, options: Options
) -> dict[str, Any]:
    """One row of the table."""
    mine = replace(compute, max_tokens=way.max_tokens)
    row = timed(name, way, config, rollouts, mine, options)
    positions, pairs = computed(name, rollouts, mine.max_tokens)
    rate = row.pop("flop")(positions, pairs) / row["seconds"] / 1e12
    peak = peak_tflops(options.device)
    return {
        **row,
        "rollout tok/s": len(rollouts.input_ids) / row["seconds"],
        "computed tok/s": positions / row["seconds"],
        "TFLOP/s": rate,
        "MFU": rate / peak if peak else None,
    }


def computed(name: str, rollouts: Rollouts, max_tokens: int) -> tuple[int, float]:
    """Positions of a step and pairs of them that are seen."""
    lengths = rollouts.lengths.astype(np.float64)
    if name != "fit":
        return len(rollouts.input_ids), float((lengths * (lengths + 1) / 2).sum())
    forests = [build_tree_layout(rollouts, order) for order in forest_micro_batches(rollouts, max_tokens)]
    return sum(len(forest) for forest in forests), sum(pairs_of(forest.depth) for forest in forests)


def timed(
    name: str, way: Way, config: Qwen2Config, rollouts: Rollouts, compute: Compute, options: Options
) -> dict[str, Any]:
    """Median seconds of one kind of step, and what its figures are made of; `compute` ends with what memory allowed."""
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(options.device)
    critic = build_critic(config, seed=0).to(options.device).train()
    choose_packing(critic, rollouts.take(np.arange(2)), "forest")
    counted = sum(p.numel() for n, p in critic.trunk.named_parameters() if p.ndim == 2 and "embed" not in n)
    heads = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    checkpoint_activations(critic, way.activations)
    if way.compiled:
        torch.compiler.reset()  # what was compiled for another model would count against the limit of variants
        compile_layers(critic)
    step: Callable[[], object]
    if name == "fit":
        step = fit_step(critic, rollouts, compute)
    elif name == "flat":
        step = flat_step(critic, rollouts, compute)
    else:
        del critic
        step = padded_step(config, rollouts, compute)
    seconds = in_turn({name: step}, options.rounds, options.device)[name]
    return {
        "step": f"{name}, {compute.attention if name != 'padded' else 'sdpa'}" + (", compiled" if way.compiled else ""),
        "seconds": statistics.median(seconds),
        "activations": f"{KEPT[way.activations]}, {compute.max_tokens:,} at once",
        "peak GB": compute.peak_memory_bytes() / 1e9,
        "flop": lambda positions, pairs: 6 * counted * positions + 12 * config.num_hidden_layers * heads * pairs,
    }


def flat_step(critic: Critic, rollouts: Rollouts, compute: Compute) -> Callable[[], object]:
    """The same step with every rollout whole: packed without padding, nothing shared."""
    optimizer = build_optimizer(critic, lr=1e-5, head_lr=1e-4, weight_decay=0.01)
    per_rollout = token_weights(rollouts.response_counts, "token-mean", None)
    weights = np.repeat(per_rollout, rollouts.lengths).astype(np.float32)
    values = rollouts.values
    assert values is not None

    def gradient() -> float:
        at_once = max(1, compute.max_tokens // int(rollouts.lengths.max()))
        loss = 0.0
        for first in range(0, len(rollouts), at_once):
            index = np.arange(first, min(first + at_once, len(rollouts)))
            order = PrefixOrder(index=index, shared=np.zeros(len(index), dtype=np.int64))
            batch = tree_input(rollouts, order, compute.device, compute.attention)
            columns = (rollouts.returns, values, weights)
            target, old, weight = (torch.from_numpy(c[batch.response_tokens]).to(compute.device) for c in columns)
            with compute.autocast():
                found = critic(batch)
            part = value_loss(found, target, old, weight, EPS)
            part.loss.backward()
            loss += float(part.loss.detach())
        return loss

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


def pairs_of(depth: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    """Pairs of positions that are seen: each position sees its ancestors and itself."""
    return float((depth + 1).sum())


def peak_tflops(device: torch.device) -> float | None:
    """The data sheet's figure; None for a device that is not in the list."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
