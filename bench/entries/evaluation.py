"""Time `eval` beside the bare model: what reading, checking, laying out and judging cost.

Both in turn, in one process:

    eval    what `critic-train eval --model` runs: find and check the shards, read them again, lay out forests, predict,
            judge with 1000 resamples
    bare    the critic's forward pass alone on the very same micro-batches, laid out beforehand
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import LlamaConfig

from bench.entry import Options, Table
from bench.measuring import in_turn, ratio
from critic_train.data.reading import RolloutReader
from critic_train.data.scanning import blocks
from critic_train.data.shards import find_shards
from critic_train.evaluation.evaluate import evaluate
from critic_train.events import RunEnded
from critic_train.model.compute import Compute
from critic_train.model.microbatches import micro_batches
from critic_train.settings import EvalSettings
from critic_train.stopping import StopRequest
from critic_train.weights.loading import build_critic, load_critic, read_model
from critic_train.weights.saving import save_critic

NAME = "evaluation"
TITLE = "eval beside the bare model's forward pass"
DEVICES = ("cpu",)

SETTINGS = {
    "quick": [(64, 64)],
    "usual": [(256, 256)],
    "full": [(256, 256), (256, 1024), (512, 256), (512, 1024)],
}
VOCABULARY, LAYERS, MAX_TOKENS = 4096, 4, 4096
PROMPT, RESPONSE, RESPONSES = 256, 128, 8


def write_shard(path: Path, rollouts: int) -> None:
    """Random rollouts, 8 a prompt, that end right or wrong."""
    rng = np.random.default_rng(0)
    length = PROMPT + RESPONSE
    prompts = rng.integers(1, VOCABULARY, (rollouts // RESPONSES, PROMPT)).repeat(RESPONSES, axis=0)
    ids = np.concatenate([prompts, rng.integers(1, VOCABULARY, (len(prompts), RESPONSE))], axis=1)
    outcome = (rng.random((len(ids), 1)) < 0.5).repeat(length, axis=1)
    columns = {
        "input_ids": ids.astype(np.int32),
        "response_mask": np.broadcast_to(np.arange(length) >= PROMPT, ids.shape),
        "values": rng.random(ids.shape, dtype=np.float32),
        "returns": outcome.astype(np.float32),
    }
    lists = {name: pa.FixedSizeListArray.from_arrays(pa.array(c.ravel()), length) for name, c in columns.items()}
    uid = pa.array([f"prompt-{row // RESPONSES}" for row in range(len(ids))])
    pq.write_table(pa.table({"uid": uid, **lists}), path, compression="zstd")


def write_critic(path: Path, hidden: int) -> None:
    """A Llama shape with 64-wide heads and a random head."""
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        intermediate_size=int(hidden * 2.75) // 64 * 64,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        pad_token_id=0,
    )
    critic = build_critic(config, seed=0)
    torch.nn.init.normal_(critic.head.weight)
    path.mkdir()
    save_critic(critic, path, None)


def eval_pass(data: Path, model: Path) -> Callable[[], object]:
    """The command's work, drained."""
    settings = EvalSettings(data=[str(data)], model=[str(model)], device="cpu", max_tokens=MAX_TOKENS)

    def judge() -> None:
        *_, last = evaluate(settings, StopRequest())
        assert isinstance(last, RunEnded)

    return judge


def bare_pass(data: Path, model: Path) -> Callable[[], object]:
    """The forward pass alone, on the micro-batches that eval computes."""
    critic = load_critic(read_model(model)).eval()
    compute = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=MAX_TOKENS)
    rollouts = blocks(RolloutReader(find_shards([str(data)])))
    batches = [batch for block in rollouts for batch in micro_batches(block, compute, forest=True)]

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                critic(batch)

    return forward


def run(options: Options) -> Table:
    """Time both at every width and size."""
    table = Table(columns={"hidden": "", "rollouts": ",", "eval s": ".2f", "bare s": ".2f", "bare/eval": ".3f"})
    for hidden, rollouts in SETTINGS[options.size]:
        with tempfile.TemporaryDirectory() as folder:
            data, model = Path(folder) / "a.parquet", Path(folder) / "critic"
            write_shard(data, rollouts)
            write_critic(model, hidden)
            seconds = in_turn({"eval": eval_pass(data, model), "bare": bare_pass(data, model)}, min(3, options.rounds))
            row = {f"{name} s": statistics.median(found) for name, found in seconds.items()}
            share = ratio(seconds["bare"], seconds["eval"])
            table.rows.append({"hidden": hidden, "rollouts": rollouts, **row, "bare/eval": share})
    table.notes = [f"prompts of {PROMPT}, {RESPONSES} responses of {RESPONSE} each"]
    return table
