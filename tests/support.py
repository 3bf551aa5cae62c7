"""Rollouts and models small enough for a test, made from a seed."""

import itertools
import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import transformers
from numpy.typing import NDArray

from critic_train.rollouts import Rollouts
from critic_train.run.checkpoint import checkpoints
from critic_train.stopping import StopRequest

VOCABULARY = 128
GOOD, BAD = 5, 6
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}


def small_config(family: str, **changes: object) -> transformers.PreTrainedConfig:
    """A two-layer configuration of an architecture family, as in "Qwen3"."""
    return getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})


def rollouts_of(
    sequences: list[NDArray[np.int32]], prompts: list[int], *, seed: int = 0, gaps: bool = False
) -> Rollouts:
    """Rollouts with the given tokens; `prompts` says how many of each are prompt. Everything else is random."""
    draw = np.random.default_rng(seed)
    lengths = [len(s) for s in sequences]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    mask = np.zeros(offsets[-1], dtype=bool)
    for start, stop, prompt in zip(offsets[:-1], offsets[1:], prompts, strict=True):
        mask[start + prompt : stop] = True
        if gaps and stop - start - prompt > 4:
            mask[start + prompt + 1 : start + prompt + 3] = False
    total = int(offsets[-1])
    return Rollouts(
        input_ids=np.concatenate(sequences).astype(np.int32),
        offsets=offsets,
        response_mask=mask,
        returns=draw.normal(size=total).astype(np.float32),
        values=draw.normal(size=total).astype(np.float32),
        group=np.asarray(
            [hash(tuple(s[:p].tolist())) for s, p in zip(sequences, prompts, strict=True)], dtype=np.int64
        ),
        row=np.arange(len(sequences), dtype=np.int64),
    )


def branching_rollouts(seed: int = 0) -> Rollouts:
    """Three prompt groups whose rollouts share prompts, parts of responses, everything, and nothing."""
    draw = np.random.default_rng(seed)

    def tokens(n: int) -> NDArray[np.int32]:
        return draw.integers(1, VOCABULARY, n).astype(np.int32)

    sequences: list[NDArray[np.int32]] = []
    prompts: list[int] = []
    for prompt_length in (5, 17, 1):
        prompt = tokens(prompt_length)
        family = [np.concatenate([prompt, tokens(int(draw.integers(6, 30)))]) for _ in range(3)]
        # Branches in the middle of a response, at two depths; a rollout that is the start of another; a copy.
        family.append(np.concatenate([family[0][: prompt_length + 4], tokens(9)]))
        family.append(np.concatenate([family[3][: prompt_length + 7], tokens(5)]))
        family.append(family[1][:-2].copy())
        family.append(family[2].copy())
        sequences += family
        prompts += [prompt_length] * len(family)
    shuffled = draw.permutation(len(sequences)).tolist()
    return rollouts_of([sequences[i] for i in shuffled], [prompts[i] for i in shuffled], seed=seed, gaps=True)


def write_shard(path: Path, rollouts: Rollouts, without: Sequence[str] = ()) -> Path:
    """Rollouts as a canonical Parquet shard, some columns left out."""
    bounds = list(itertools.pairwise(rollouts.offsets.tolist()))
    columns = {
        "uid": [str(key) for key in rollouts.group.tolist()],
        "input_ids": [rollouts.input_ids[a:b] for a, b in bounds],
        "response_mask": [rollouts.response_mask[a:b] for a, b in bounds],
        "values": [rollouts.values[a:b] for a, b in bounds],
        "returns": [rollouts.returns[a:b] for a, b in bounds],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: column for name, column in columns.items() if name not in without}), path)
    return path


def readable_rollouts(prompts: int, *, seed: int = 0, responses: int = 4) -> Rollouts:
    """Rollouts whose return can be read off the prompt: 1 where its first token is GOOD, 0 where it is BAD.

    A critic that learns anything explains most of the variance; the stored values explain none of it.
    """
    draw = np.random.default_rng(seed)
    sequences: list[NDArray[np.int32]] = []
    lengths: list[int] = []
    for number in range(prompts):
        prompt = draw.integers(1, VOCABULARY, int(draw.integers(3, 9)))
        prompt[0] = GOOD if number % 2 else BAD
        for _ in range(responses):
            sequences.append(np.concatenate([prompt, draw.integers(1, VOCABULARY, int(draw.integers(4, 14)))]))
            lengths.append(len(prompt))
    rollouts = rollouts_of([s.astype(np.int32) for s in sequences], lengths, seed=seed)
    first = rollouts.input_ids[rollouts.offsets[:-1]]
    returns = np.repeat((first == GOOD).astype(np.float32), rollouts.lengths)
    values = np.full_like(returns, 0.5)
    return replace(rollouts, returns=returns, values=values, group=np.repeat(np.arange(prompts), responses))


@dataclass(slots=True)
class StopAfter(StopRequest):
    """Asks to stop, as SIGTERM does, when it has been looked at so many times: at any batch or micro-batch of a job."""

    looks: int = 0

    @property
    def requested(self) -> bool:
        self.looks -= 1
        if self.looks < 0:
            self.signal_number = signal.SIGTERM
        return self.signal_number is not None


def lines_executed(function: Callable[[], object]) -> int:
    """How many lines of Python a call executes: a measure of its work that is the same on a busy machine."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def records(out: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def newest(out: Path) -> Path:
    """The newest checkpoint of a run."""
    return checkpoints(out / "checkpoints")[-1]
