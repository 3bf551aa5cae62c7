"""A fit step beside the padded step a user would write today, and beside the bare model.

Three steps on the same rollouts, in turn, in one process:

    fit     what `critic-train fit` runs: lay out the forest, forward, loss, backward, clip, fused AdamW
    padded  AutoModelForTokenClassification on rows padded on the right, the same loss, clip and optimizer, and the
            same token budget a micro-batch
    bare    the whole model's forward and backward alone on the forest's unique tokens, laid out beforehand
"""

import statistics
from typing import Any

from transformers import LlamaConfig

from bench.drawing import VOCABULARY, Shape, draw
from bench.entry import Options, Table
from bench.measuring import in_turn, ratio
from bench.steps import bare_pass, fit_step, padded_step
from critic_train.model.compute import Compute
from critic_train.model.loading import build_critic
from critic_train.model.microbatches import micro_batches
from critic_train.model.selfcheck import choose_packing
from critic_train.settings import Precision

NAME = "step"
TITLE = "A fit step beside the padded step and the bare model"
DEVICES = ("cpu",)

LAYERS = 4
MAX_TOKENS = 4096
SHAPES = (
    (Shape("prompt 256, 8 responses of 128", 256, 128, 128), 2.3),
    (Shape("prompt 1024, 8 responses of 256", 1024, 256, 256), 2.9),
    (Shape("prompt 256, 8 responses of 32 to 128", 256, 32, 128), 3.7),
    (Shape("no sharing, lengths 32 to 512", 4, 28, 508, responses=1, groups=24), 1.7),
)
SETTINGS: dict[str, list[tuple[int, Precision]]] = {
    "quick": [(64, "fp32")],
    "usual": [(256, "fp32")],
    "full": [(256, "fp32"), (256, "bf16"), (1024, "fp32"), (1024, "bf16")],
}


def run(options: Options) -> Table:
    """Every shape at every width and precision."""
    table = Table(
        columns={
            "rollouts": "",
            "hidden": "",
            "precision": "",
            "padded/computed": ".2f",
            "fit tok/s": ",.0f",
            "padded/fit": ".2f",
            "goal": "",
            "fit/bare": ".2f",
        },
        notes=[
            f"{LAYERS} layers, 64-wide heads, at most {MAX_TOKENS:,} tokens at once; padded/computed is of tokens, "
            "padded/fit of times; fit/bare should be at most 1.10"
        ],
    )
    for hidden, precision in SETTINGS[options.size]:
        for shape, goal in SHAPES:
            table.rows.append(measure(shape, goal, hidden, precision, options))
    return table


def measure(shape: Shape, goal: float, hidden: int, precision: Precision, options: Options) -> dict[str, Any]:
    """One line of the table. Seconds are medians; ratios are medians of the rounds' own ratios."""
    compute = Compute(device=options.device, precision=precision, max_tokens=MAX_TOKENS)
    rollouts = draw(shape)
    critic = build_critic(config_of(hidden), seed=0).to(options.device).train()
    choose_packing(critic, rollouts, "forest")
    seconds = in_turn(
        {
            "fit": fit_step(critic, rollouts, compute),
            "padded": padded_step(config_of(hidden), rollouts, compute),
            "bare": bare_pass(critic, rollouts, compute),
        },
        options.rounds,
        options.device,
    )
    computed = sum(batch.computed_tokens for batch in micro_batches(rollouts, compute, forest=True))
    return {
        "rollouts": shape.name,
        "hidden": hidden,
        "precision": precision,
        "padded/computed": len(rollouts) * int(rollouts.lengths.max()) / computed,
        "fit tok/s": len(rollouts.input_ids) / statistics.median(seconds["fit"]),
        "padded/fit": ratio(seconds["padded"], seconds["fit"]),
        "goal": f"{goal:g}",
        "fit/bare": ratio(seconds["fit"], seconds["bare"]),
        "seconds": seconds,
    }


def config_of(hidden: int) -> LlamaConfig:
    """A Llama shape with 64-wide heads."""
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        intermediate_size=int(hidden * 2.75) // 64 * 64,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
    )
