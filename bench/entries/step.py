"""A fit step beside the padded step a user would write today, beside padded rows, and beside the bare model.

The steps, on the same rollouts, in turn, in one process:

    fit     what `critic-train fit` runs: lay out the forest, forward, loss, backward, clip, fused AdamW
    padded  AutoModelForTokenClassification on rows padded on the right, the same loss, clip and optimizer, and the
            same token budget a micro-batch; where transformers has no such class for the model, it is left out
    rows    what `critic-train fit --packing rows` runs: rows of about one length together, padded on the right. It is
            what architectures get that cannot share prefixes
    bare    the whole model's forward and backward alone on the forest's unique tokens, laid out beforehand
"""

import os
import statistics
from typing import Any

from bench.drawing import Shape, draw
from bench.entry import Options, Table
from bench.measuring import in_turn, ratio
from bench.models import LAYERS, MODELS, Model
from bench.steps import bare_pass, fit_step, padded_step
from critic_train.model.compute import Compute
from critic_train.model.memory import keep_freed_memory
from critic_train.model.microbatches import micro_batches
from critic_train.model.selfcheck import choose_packing
from critic_train.settings import Precision
from critic_train.weights.loading import build_critic

NAME = "step"
TITLE = "A fit step beside the padded step, padded rows and the bare model"
DEVICES = ("cpu",)

MAX_TOKENS = 4096
SHAPES = (
    Shape("prompt 256, 8 responses of 128", 256, 128, 128),
    Shape("prompt 1024, 8 responses of 256", 1024, 256, 256),
    Shape("prompt 256, 8 responses of 32 to 128", 256, 32, 128),
    Shape("no sharing, lengths 32 to 512", 4, 28, 508, responses=1, groups=24),
)
SETTINGS: dict[str, list[tuple[int, Precision]]] = {
    "quick": [(64, "fp32")],
    "usual": [(256, "fp32")],
    "full": [(256, "fp32"), (256, "bf16"), (1024, "fp32"), (1024, "bf16")],
}


def run(options: Options) -> Table:
    """Every model on every shape at every width and precision; BENCH_STEP_MODEL names one model."""
    table = Table(
        columns={
            "model": "",
            "rollouts": "",
            "hidden": "",
            "precision": "",
            "padded/computed": ".2f",
            "fit tok/s": ",.0f",
            "padded/fit": ".2f",
            "rows/fit": ".2f",
            "goal": "",
            "fit/bare": ".2f",
        },
        notes=[
            f"{LAYERS} layers, 64-wide heads, at most {MAX_TOKENS:,} tokens at once; padded/computed is of tokens, "
            "padded/fit and rows/fit of times; the goal is padded/fit where there is one, else rows/fit; fit/bare "
            "should be at most 1.10"
        ],
    )
    chosen = os.environ.get("BENCH_STEP_MODEL", "")
    keep_freed_memory()  # as fit does
    for hidden, precision in SETTINGS[options.size]:
        for name, model in MODELS.items():
            if chosen in name:
                for shape, goal in zip(SHAPES, model.goals, strict=True):
                    row = measure(model, shape, hidden, precision, options)
                    table.rows.append({"model": name, "goal": None if goal is None else f"{goal:g}", **row})
    return table


def measure(model: Model, shape: Shape, hidden: int, precision: Precision, options: Options) -> dict[str, Any]:
    """One line of the table. Seconds are medians; ratios are medians of the rounds' own ratios."""
    compute = Compute(device=options.device, precision=precision, max_tokens=MAX_TOKENS)
    rollouts = draw(shape)
    critics = [build_critic(model.config(hidden), seed=0).to(options.device).train() for _ in range(2)]
    for critic, packing in zip(critics, ("forest", "rows"), strict=True):
        choose_packing(critic, rollouts, packing)  # type: ignore[arg-type]
    steps = {
        "fit": fit_step(critics[0], rollouts, compute, forest=True),
        "rows": fit_step(critics[1], rollouts, compute, forest=False),
        "bare": bare_pass(critics[0], rollouts, compute),
    }
    if model.classifier:
        steps["padded"] = padded_step(model.config(hidden), rollouts, compute)
    seconds = in_turn(steps, options.rounds, options.device)
    computed = sum(batch.computed_tokens for batch in micro_batches(rollouts, compute, forest=True))
    return {
        "rollouts": shape.name,
        "hidden": hidden,
        "precision": precision,
        "padded/computed": len(rollouts) * int(rollouts.lengths.max()) / computed,
        "fit tok/s": len(rollouts.input_ids) / statistics.median(seconds["fit"]),
        "padded/fit": ratio(seconds["padded"], seconds["fit"]) if model.classifier else None,
        "rows/fit": ratio(seconds["rows"], seconds["fit"]),
        "fit/bare": ratio(seconds["fit"], seconds["bare"]),
        "seconds": seconds,
    }
