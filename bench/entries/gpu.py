"""What a GPU is made to do: TFLOP/s and MFU of a fit step, beside the flat variable-length step and the padded step.

Qwen2.5-shaped models with random weights, bf16, one prompt with eight responses, half of a sequence each; see
bench.gpu_steps for what is counted.

Where a micro-batch's activations do not fit, the fit and the flat step are taken in three ways: layers computed again,
half of their products computed again (selective), and smaller micro-batches that keep all; each by itself. The best
of them is then compiled. No figure was printed by this file yet: it has not met a GPU.
"""

from dataclasses import replace
from typing import Any

from transformers import Qwen2Config

from bench.drawing import Shape, draw
from bench.entry import Options, Table
from bench.gpu_steps import GpuSteps, Way, computed, shape_config
from critic_train.layers.attention_kernel import AttentionCall
from critic_train.layers.kernel_choice import choose_attention
from critic_train.layers.prefix_tree import build_tree_layout, prefix_order
from critic_train.model.selfcheck import KERNEL_TOKENS
from critic_train.model.trial import cut
from critic_train.settings import ActivationCheckpointing

NAME = "gpu"
TITLE = "A fit step on a GPU, beside the flat and the padded step"
DEVICES = ("cuda",)

VOCABULARY = 32_768
RUNS = {
    "quick": [("tiny", 64)],
    "usual": [("0.5B", 2048), ("1.5B", 2048)],
    "full": [("0.5B", 2048), ("0.5B", 8192), ("1.5B", 2048), ("1.5B", 8192)],
}
MAX_TOKENS = 40_960
KEPT_BYTES = 40 * 2**30
"""Room for activations beside weights, gradients and moments."""
CHECKPOINTING: tuple[ActivationCheckpointing, ...] = ("layer", "selective")


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
    """The steps one after another."""
    config = shape_config(model, VOCABULARY)
    rollouts = draw(Shape("", length // 2, length // 2, length // 2), vocabulary=VOCABULARY)
    few = cut(rollouts, KERNEL_TOKENS)
    call = AttentionCall(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        key_size=config.hidden_size // config.num_attention_heads,
        value_size=config.hidden_size // config.num_attention_heads,
    )
    layout = build_tree_layout(few, prefix_order(few))
    attention, passed = choose_attention("auto", [call], layout, options.device, "bf16")
    steps = GpuSteps(config, rollouts, options.device, attention, options.rounds)
    rows = []
    for name in ("fit", "flat", "padded"):
        tried = [
            (way, steps.measured(name, way)) for way in ways(name, config, computed(name, rollouts, MAX_TOKENS)[0])
        ]
        if name != "padded":  # the best of them once more, compiled, which selective checkpoints cannot be
            able = [each for each in tried if each[0].activations != "selective"]
            way = replace(max(able, key=lambda each: each[1]["rollout tok/s"])[0], compiled=True)
            tried.append((way, steps.measured(name, way)))
        rows += [{"model": model, "sequence": length, "passed over": passed, **row} for _, row in tried]
    best = max(row["rollout tok/s"] for row in rows if row["step"].startswith("fit"))
    for row in rows:
        row["fit/this"] = best / row["rollout tok/s"]
    return rows


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
