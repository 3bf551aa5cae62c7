"""One long rollout, forward and backward, on one process and cut over several: peak memory, and the exchange's cost.

Each process is started anew and computes one gradient. Its peak is the most memory it held (the resident set), and
beside it stands what the activations alone are expected to take. The all-to-all is measured by the bytes that a rank
sends and by the CPU time of its calls, gloo's copies among them.
"""

import multiprocessing
import os
import queue
import resource
import signal
import socket
import time
from multiprocessing.context import SpawnProcess
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from bench.entry import Options, Table
from critic_train.distributed.init import init_ranks
from critic_train.layers import sequence_parallel
from critic_train.layers.attention import TREE_ATTENTION
from critic_train.layers.sequence_parallel import SequenceRanks
from critic_train.model.compute import Compute
from critic_train.model.fsdp import shard
from critic_train.model.last_layer import skip_unread_positions
from critic_train.model.memory import give_back_freed_memory
from critic_train.model.oom import activation_bytes
from critic_train.rollouts import rollouts_of_tokens
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.train_step import LossRecipe, accumulate_gradient
from critic_train.weights.loading import build_critic

NAME = "sequence"
TITLE = "One long rollout cut over ranks (--sequence-parallel)"
DEVICES = ("cpu",)

TOKENS = {"quick": 2_048, "usual": 8_192, "full": 32_768}
RANKS = (1, 2, 4)
LOOK_SECONDS = 1.0
"""Between looks at whether all ranks are still there."""
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1_024,
    "max_position_embeddings": 131_072,
}


def run(options: Options) -> Table:
    """Compute the gradient of one rollout on 1, 2 and 4 processes."""
    tokens = TOKENS[options.size]
    table = Table(
        columns={
            "ranks": "d",
            "peak MB": ".0f",
            "of one": ".2f",
            "above idle MB": ".0f",
            "expected MB": ".0f",
            "CPU seconds": ".1f",
            "sent MB": ".1f",
            "exchange CPU s": ".2f",
            "loss": ".6f",
        }
    )
    for size in RANKS:
        found = max(on_processes(size, tokens), key=lambda rank: float(rank["peak MB"]))
        one = table.rows[0]["peak MB"] if table.rows else found["peak MB"]
        table.add({**found, "ranks": size, "of one": found["peak MB"] / one})
    table.notes = [
        f"{tokens:,} tokens, hidden 256, 8 layers, float32; of several ranks the one that held the most",
        "peak: resident set, Python and its libraries among it; above idle: less what it was before the gradient",
        "expected: what activations of a rank's positions take by oom.activation_bytes",
        "sent: by a rank, to itself included; exchange: CPU time within all_to_all_single, forward and backward",
    ]
    return table


def on_processes(size: int, tokens: int) -> list[dict[str, Any]]:
    """What each rank measures.

    Raises:
        RuntimeError: one of them has ended without an answer, as where memory ran out; the others are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=_rank, args=(answers, rank, size, port, tokens)) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        found = [_next_answer(answers, processes) for _ in processes]
        for process in processes:
            process.join()
    finally:  # ranks wait for one that is gone
        for process in processes:
            process.kill()
            process.join()
    return found


def _next_answer(answers: Any, processes: list[SpawnProcess]) -> dict[str, Any]:
    """What the next of the ranks that are done has measured."""
    while True:
        failed = {rank: code for rank, process in enumerate(processes) if (code := process.exitcode)}
        try:
            found: dict[str, Any] = answers.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            if failed:
                rank, code = next(iter(failed.items()))
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                raise RuntimeError(f"rank {rank} of {len(processes)} {how}") from None
        else:
            return found


def _rank(answers: Any, rank: int, size: int, port: int, tokens: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    give_back_freed_memory()  # as fit does where positions are cut
    answers.put(measured(tokens))


def measured(tokens: int) -> dict[str, Any]:
    """Memory, time and what was exchanged for the gradient of one rollout, of which half is prompt."""
    ids = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], tokens)
    rollouts = rollouts_of_tokens([ids], [tokens // 2])
    rollouts.returns[:] = np.random.default_rng(1).normal(size=tokens)
    with init_ranks(FitSettings(data=["none"]), nproc=1, device="cpu") as ranks:
        critic = build_critic(LlamaConfig(**SHAPE), seed=0).train()
        critic.head.set_linear(torch.randn(SHAPE["hidden_size"], generator=torch.Generator().manual_seed(2)), 0.0)
        compute = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=tokens, ranks=ranks)
        if ranks.size > 1:
            group = ranks.adjacent(ranks.size)
            compute.sequence = SequenceRanks(group=group, size=ranks.size, rank=ranks.rank)
            shard(critic, compute)
        critic.trunk.set_attn_implementation(TREE_ATTENTION)
        skip_unread_positions(critic.trunk)
        exchanged = _counted()
        idle, began = _resident_bytes(), time.process_time()
        recipe = LossRecipe(cliprange_value=None, mode="token-mean", scale_factor=None)
        result = accumulate_gradient(critic, rollouts, recipe, compute, forest=True, stop=StopRequest())
        seconds = time.process_time() - began
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "peak MB": peak / 1e6,
        "above idle MB": (peak - idle) / 1e6,
        "expected MB": activation_bytes(critic.trunk, -(-tokens // ranks.size), compute) / 1e6,
        "CPU seconds": seconds,
        "sent MB": exchanged["bytes"] / 1e6,
        "exchange CPU s": exchanged["seconds"],
        "loss": result.value_loss,
    }


def _counted() -> dict[str, float]:
    """Counts the bytes that are exchanged from here on, and the CPU time of it."""
    counts = {"bytes": 0.0, "seconds": 0.0}
    all_to_all = sequence_parallel._all_to_all

    def counting(
        rows: torch.Tensor, sent: list[int], received: list[int], group: torch.distributed.ProcessGroup
    ) -> torch.Tensor:
        began = time.process_time()
        output = all_to_all(rows, sent, received, group)
        counts["seconds"] += time.process_time() - began
        counts["bytes"] += rows.nbytes
        return output

    sequence_parallel._all_to_all = counting
    return counts


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
