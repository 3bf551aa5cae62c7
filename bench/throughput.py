"""Time a fit step beside the padded step a user would write today, and beside the bare model.

    ./dev bench                       every setting, hidden 256 and 1024, float32 and bf16 (about 25 minutes)
    ./dev bench --hidden 256 --precision fp32 --rounds 7
    ./dev bench --json throughput.json

Three steps on the same rollouts, in turn, in one process on one thread; CPU time, medians of several rounds:

    fit     what `critic-train fit` runs: lay out the forest, forward, loss, backward, clip, fused AdamW
    padded  AutoModelForTokenClassification on rows padded on the right, the same loss, clip and optimizer, and the
            same token budget a micro-batch
    bare    the model's forward and backward alone on the forest's unique tokens, laid out beforehand
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForTokenClassification, LlamaConfig

from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.loading import build_critic
from critic_train.model.microbatches import micro_batches
from critic_train.model.selfcheck import choose_packing
from critic_train.rollouts import Rollouts
from critic_train.settings import Precision
from critic_train.stopping import StopRequest
from critic_train.training.optimizer import build_optimizer
from critic_train.training.step import LossRecipe, accumulate_gradient, apply_gradient

VOCABULARY = 4096
LAYERS = 4
EPS = 0.5
GRAD_CLIP = 1.0


@dataclass(frozen=True)
class Shape:
    """Rollouts to time: `groups` prompts of `prompt` tokens, `responses` each, lengths drawn between two bounds."""

    name: str
    goal: float
    prompt: int
    shortest: int
    longest: int
    responses: int = 8
    groups: int = 1


SHAPES = (
    Shape("prompt 256, 8 responses of 128", 2.3, 256, 128, 128),
    Shape("prompt 1024, 8 responses of 256", 2.9, 1024, 256, 256),
    Shape("prompt 256, 8 responses of 32 to 128", 3.7, 256, 32, 128),
    Shape("no sharing, lengths 32 to 512", 1.7, 4, 28, 508, responses=1, groups=24),
)


def draw(shape: Shape, seed: int) -> Rollouts:
    """Random rollouts of a shape; lengths are even between the bounds."""
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(shape.groups):
        prompt = rng.integers(1, VOCABULARY, shape.prompt)
        for _ in range(shape.responses):
            length = int(rng.integers(shape.shortest, shape.longest + 1))
            sequences.append(np.concatenate([prompt, rng.integers(1, VOCABULARY, length)]))
    offsets = np.cumsum([0] + [len(s) for s in sequences]).astype(np.int64)
    total = int(offsets[-1])
    place = np.arange(total) - np.repeat(offsets[:-1], np.diff(offsets))
    return Rollouts(
        input_ids=np.concatenate(sequences).astype(np.int32),
        offsets=offsets,
        response_mask=place >= shape.prompt,
        returns=rng.normal(size=total).astype(np.float32),
        values=rng.normal(size=total).astype(np.float32),
        group=np.repeat(np.arange(shape.groups), shape.responses).astype(np.int64),
        row=np.arange(len(sequences), dtype=np.int64),
    )


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


def fit_step(critic: Critic, rollouts: Rollouts, compute: Compute) -> Callable[[], object]:
    """The step of `critic-train fit`."""
    optimizer = build_optimizer(critic, lr=1e-5, head_lr=1e-4, weight_decay=0.01)
    recipe = LossRecipe(cliprange_value=EPS, mode="token-mean", scale_factor=None)
    stop = StopRequest()

    def step() -> None:
        result = accumulate_gradient(critic, rollouts, recipe, compute, forest=True, stop=stop)
        assert result is not None
        apply_gradient(critic, optimizer, GRAD_CLIP, result.value_loss)

    return step


def bare_pass(critic: Critic, rollouts: Rollouts, compute: Compute) -> Callable[[], object]:
    """Forward and backward of the whole trunk on the forest's tokens; layout, head, loss and optimizer left out."""
    batches = list(micro_batches(rollouts, compute, forest=True))
    for batch in batches:  # every layer whole
        batch.trunk_arguments["forest_plan"].kept = None
    slopes = [torch.randn(batch.computed_tokens, critic.trunk.config.hidden_size) for batch in batches]

    def step() -> None:
        for batch, slope in zip(batches, slopes, strict=True):
            with compute.autocast():
                hidden = critic.trunk(use_cache=False, **batch.trunk_arguments).last_hidden_state[0]
            hidden.backward(slope.to(hidden.dtype))
        critic.zero_grad(set_to_none=True)

    return step


def padded_step(config: LlamaConfig, rollouts: Rollouts, compute: Compute) -> Callable[[], object]:
    """What a user writes today: padded rows through transformers' token classifier."""
    config.num_labels = 1
    config.classifier_dropout = 0.0
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_config(config, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
    lengths = rollouts.lengths
    width = int(lengths.max())
    rows = max(1, compute.max_tokens // width)
    tensors = {name: torch.zeros(len(rollouts), width) for name in ("mask", "returns", "values")}
    ids = torch.zeros(len(rollouts), width, dtype=torch.long)
    for i, (start, stop) in enumerate(zip(rollouts.offsets[:-1], rollouts.offsets[1:], strict=True)):
        ids[i, : stop - start] = torch.from_numpy(rollouts.input_ids[start:stop].astype(np.int64))
        tensors["mask"][i, : stop - start] = torch.from_numpy(rollouts.response_mask[start:stop].astype(np.float32))
        tensors["returns"][i, : stop - start] = torch.from_numpy(rollouts.returns[start:stop])
        assert rollouts.values is not None
        tensors["values"][i, : stop - start] = torch.from_numpy(rollouts.values[start:stop])
    seen = (torch.arange(width)[None] < torch.from_numpy(lengths)[:, None]).long()
    response_tokens = tensors["mask"].sum()

    def step() -> None:
        for first in range(0, len(rollouts), rows):
            part = slice(first, first + rows)
            with compute.autocast():
                logits = model(input_ids=ids[part], attention_mask=seen[part], use_cache=False).logits
            value = logits[:, :-1, 0].float()
            target, old = tensors["returns"][part, 1:], tensors["values"][part, 1:]
            clipped = old + (value - old).clamp(-EPS, EPS)
            worst = torch.maximum((value - target) ** 2, (clipped - target) ** 2)
            (0.5 * (worst * tensors["mask"][part, 1:]).sum() / response_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@dataclass(frozen=True)
class Row:
    """One line of the table. Seconds are medians of CPU time; ratios are medians of the rounds' own ratios."""

    shape: str
    hidden: int
    precision: str
    rollout_tokens: int
    padded_tokens: int
    computed_tokens: int
    fit_seconds: float
    padded_seconds: float
    bare_seconds: float
    padded_over_fit: float
    fit_over_bare: float
    goal: float


def measure(shape: Shape, hidden: int, precision: Precision, rounds: int, max_tokens: int) -> Row:
    """Run the three steps in turn, one round uncounted."""
    compute = Compute(device=torch.device("cpu"), precision=precision, max_tokens=max_tokens)
    rollouts = draw(shape, seed=0)
    critic = build_critic(config_of(hidden), seed=0).train()
    choose_packing(critic, rollouts, "forest")
    steps = {
        "fit": fit_step(critic, rollouts, compute),
        "padded": padded_step(config_of(hidden), rollouts, compute),
        "bare": bare_pass(critic, rollouts, compute),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.process_time()
            step()
            if number:
                seconds[name].append(time.process_time() - began)

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))

    return Row(
        shape=shape.name,
        hidden=hidden,
        precision=precision,
        rollout_tokens=len(rollouts.input_ids),
        padded_tokens=len(rollouts) * int(rollouts.lengths.max()),
        computed_tokens=sum(b.computed_tokens for b in micro_batches(rollouts, compute, forest=True)),
        fit_seconds=statistics.median(seconds["fit"]),
        padded_seconds=statistics.median(seconds["padded"]),
        bare_seconds=statistics.median(seconds["bare"]),
        padded_over_fit=ratio("padded", "fit"),
        fit_over_bare=ratio("fit", "bare"),
        goal=shape.goal,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--precision", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--shapes", type=int, nargs="+", default=list(range(len(SHAPES))), help="0 to 3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    machine = {
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "rounds": chosen.rounds,
        "max_tokens": chosen.max_tokens,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{'rollouts':38} {'hidden':>6} {'':4} {'padded/computed':>15} {'fit tok/s':>10}", end=" ")
    print(f"{'padded/fit':>10} {'goal':>5} {'fit/bare':>8}")
    rows = []
    for hidden in chosen.hidden:
        for precision in chosen.precision:
            for number in chosen.shapes:
                row = measure(SHAPES[number], hidden, precision, chosen.rounds, chosen.max_tokens)
                rows.append(row)
                print(
                    f"{row.shape:38} {row.hidden:6} {row.precision:4} {row.padded_tokens / row.computed_tokens:15.2f} "
                    f"{row.rollout_tokens / row.fit_seconds:10.0f} {row.padded_over_fit:9.2f}x {row.goal:5.1f} "
                    f"{row.fit_over_bare:7.2f}x",
                    flush=True,
                )
    if chosen.json:
        chosen.json.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2))


if __name__ == "__main__":
    main()
