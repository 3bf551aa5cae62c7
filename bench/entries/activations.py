"""Memory and time of a step over one long rollout, by how much is kept for its backward pass.

A new Llama (hidden size 256, 8 layers) takes one step over one random rollout on one thread of the CPU, in a process
of its own for every kind of `--activation-checkpointing`. Shown are the most resident memory of the process, how much
of it came with the step, the bytes that the dry run's formula expects of the activations, and CPU seconds. `windowed`
gives every layer a sliding window of 256 tokens: attention then costs little, and what is computed again shows most.
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import torch
from transformers import LlamaConfig, MistralConfig

from bench.entry import Options, Table
from critic_train.model.compute import Compute, Keeping
from critic_train.model.memory import checkpoint_activations
from critic_train.model.oom import activation_bytes
from critic_train.model.selfcheck import choose_packing
from critic_train.rollouts import rollouts_of_tokens
from critic_train.stopping import StopRequest
from critic_train.training.optimizer import build_optimizer
from critic_train.training.train_step import LossRecipe, accumulate_gradient
from critic_train.weights.loading import build_critic

NAME = "activations"
TITLE = "One long rollout: memory and time of a step by --activation-checkpointing"
DEVICES = ("cpu",)

LENGTHS = {
    "quick": ((2048, True), (2048, False)),
    "usual": ((2048, False), (8192, True)),
    "full": ((8192, True), (8192, False), (32768, True)),
}
"""(tokens, windowed). Beyond 2,048 tokens full attention takes most of the time."""
KINDS = ("none", "tiles", "layer", "layer-tiles")
SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4}
WINDOW, VOCABULARY = 256, 1000
PROGRAM = """
import json, sys
from bench.entries.activations import step
kind, tokens, windowed = sys.argv[1:]
print(json.dumps(step(kind, int(tokens), bool(windowed))))
"""
UNIT = 1 if sys.platform == "darwin" else 1024


def step(kind: str, tokens: int, windowed: bool) -> dict[str, float]:
    """Take a step in this process; bytes and seconds."""
    torch.set_num_threads(1)
    sizes = SHAPE | {"num_key_value_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": tokens}
    config = MistralConfig(sliding_window=WINDOW, **sizes) if windowed else LlamaConfig(**sizes)
    critic = build_critic(config, seed=0).train()
    ids = np.random.default_rng(0).integers(1, VOCABULARY, tokens)
    choose_packing(critic, rollouts_of_tokens([ids[:100], ids[:80]], [50, 50]), "auto")
    checkpoint_activations(critic, kind)  # type: ignore[arg-type]
    rollouts = replace(rollouts_of_tokens([ids], [200]), values=np.zeros(tokens, np.float32))
    optimizer = build_optimizer(critic, lr=1e-4, head_lr=1e-3, weight_decay=0.0)
    recipe = LossRecipe(cliprange_value=0.5, mode="token-mean", scale_factor=None)
    compute = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=tokens, keeping=Keeping(kind))  # type: ignore[arg-type]
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    accumulate_gradient(critic, rollouts, recipe, compute, forest=True, stop=StopRequest())
    optimizer.step()
    seconds, peak = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    expected = activation_bytes(critic.trunk, tokens, compute)
    return {"peak": peak * UNIT, "step": (peak - before) * UNIT, "expected": expected, "seconds": seconds}


def run(options: Options) -> Table:
    """Measure every kind at every length."""
    columns = {"tokens": ",", "attention": "", "kept": "", "peak MB": ",.0f", "step MB": ",.0f", "expected MB": ",.0f"}
    table = Table(columns=columns | {"of none": ".2f", "CPU s": ".1f", "time of none": ".2f"})
    for tokens, windowed in LENGTHS[options.size]:
        first: dict[str, float] = {}
        for kind in KINDS:
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, kind, str(tokens), "windowed" if windowed else ""],
                check=True,
                capture_output=True,
                text=True,
            )
            row = json.loads(done.stdout.splitlines()[-1])
            first = first or row
            shown = [tokens, "windowed" if windowed else "full", kind]
            shown += [row[name] / 1e6 for name in ("peak", "step", "expected")]
            shown += [row["peak"] / first["peak"], row["seconds"], row["seconds"] / first["seconds"]]
            table.add(dict(zip(table.columns, shown, strict=True)))
    return table
