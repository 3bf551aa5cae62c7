"""A policy whose values are known by sampling: a small transformer that adds up digits, step by step.

A prompt holds six digits. A response draws six more and gives, after each, the sum of it and the sum before (first of
all the prompt's last digit), a token for each number; then it ends. It is right where all sums are. The policy is
trained on right ones until it samples about three in ten of them right: what a state is worth depends on what was
written so far, for a wrong sum loses all, and next to nothing differs between prompts. The value of a state is the
share of right ones among many continuations of it that the policy samples. (Sums modulo a number would tell a critic
nothing by any two tokens, and one of the size that is trained here learns nothing from outcomes alone.)
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench.worlds import NOISE, PEERS, TRUE, Task, row, write_rows

BASE, TERMS = 5, 6
END = (BASE - 1) * (TERMS + 1) + 1
"""One above the largest sum."""
PROMPT, RESPONSE = 6, 2 * TERMS + 1
RIGHT, LEARNING_RATE, SUMS, MOST_STEPS = 0.4, 3e-3, 64, 600
"""The share of responses whose sums the policy gets right in the end; how it is trained."""
POLICY = "policy"
PREFIXES, CONTINUATIONS = 6, 64
"""States of each held-out prompt whose values are sampled, and by how many continuations."""


def sums(draw: np.random.Generator, count: int) -> NDArray[np.int64]:
    """int64 [count, PROMPT + RESPONSE]: prompts and right responses."""
    prompt, digits = draw.integers(0, BASE, (count, PROMPT)), draw.integers(0, BASE, (count, TERMS))
    added = prompt[:, -1:] + digits.cumsum(axis=1)
    response = np.stack([digits, added], axis=-1).reshape(count, -1)
    return np.concatenate([prompt, response, np.full((count, 1), END)], axis=1)


def are_right(rows: Tensor) -> Tensor:
    """bool [n] of int64 [n, PROMPT + RESPONSE]: whether all sums are right, and the response ends where it has to."""
    digits, added = rows[:, PROMPT:-1:2], rows[:, PROMPT + 1 : -1 : 2]
    before = torch.cat([rows[:, PROMPT - 1 : PROMPT], added[:, :-1]], dim=1)
    steps = (digits < BASE) & (added == before + digits)
    return steps.all(1) & (rows[:, -1] == END)


def trained_policy(seed: int) -> Any:
    """A transformer that samples about RIGHT of all sums right; some 15 CPU seconds."""
    draw = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=END + 1,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                bos_token_id=END,
                eos_token_id=END,
            )
        )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    lately = 0.0
    for _ in range(MOST_STEPS):
        ids = torch.from_numpy(sums(draw, SUMS))
        chosen = policy(input_ids=ids[:, :-1]).logits[:, PROMPT - 1 :].log_softmax(-1).gather(2, ids[:, PROMPT:, None])
        (-chosen.mean()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        lately = 0.8 * lately + 0.2 * float(chosen.detach()[:, 1::2].sum((1, 2)).exp().mean())
        if lately > RIGHT:
            break
    return policy.eval()


@torch.no_grad()
def continued(policy: Any, prefixes: Tensor, draw: torch.Generator) -> Tensor:
    """int64 [n, PROMPT + RESPONSE]: sampled on from int64 [n, k] until END, which then fills the row."""
    rows, cache, given = prefixes, None, prefixes
    ended = torch.zeros(len(rows), dtype=torch.bool)
    while rows.shape[1] < PROMPT + RESPONSE:
        output = policy(input_ids=given, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        given = torch.multinomial(output.logits[:, -1].softmax(-1), 1, generator=draw)
        given[ended] = END
        ended |= given[:, 0] == END
        rows = torch.cat([rows, given], dim=1)
    return rows


def shard(path: Path, policy: Any, prompts: int, seed: int, *, values: bool) -> None:
    """Write rollouts of so many prompts, PEERS of each; with `values`, the sampled values of some of their states."""
    questions = torch.from_numpy(sums(np.random.default_rng(seed), prompts)[:, :PROMPT])
    draw, rows = torch.Generator().manual_seed(seed), list[dict[str, Any]]()
    rollouts = continued(policy, questions.repeat_interleave(PEERS, 0), draw)
    for place, (ids, outcome) in enumerate(zip(rollouts.tolist(), are_right(rollouts).tolist(), strict=True)):
        length = PROMPT + [*ids[PROMPT:], END].index(END) + 1
        rows.append(row(f"{seed}-{place // PEERS}", ids[:length], PROMPT, float(outcome)))
    if values:
        sample_values(rows, rollouts, policy, draw)
    write_rows(path, rows)


def sample_values(rows: list[dict[str, Any]], rollouts: Tensor, policy: Any, draw: torch.Generator) -> None:
    """Add TRUE and NOISE to rows: NaN but for the states that are sampled."""
    for entry in rows:
        entry |= {name: [float("nan")] * len(entry["input_ids"]) for name in (TRUE, NOISE)}
    by_depth: dict[int, list[int]] = {}
    for first in range(0, len(rows), PEERS):
        for place in (first + torch.randperm(PEERS, generator=draw)[:PREFIXES]).tolist():
            length = len(rows[place]["input_ids"])
            by_depth.setdefault(int(torch.randint(PROMPT, length, (1,), generator=draw)), []).append(place)
    for depth, places in by_depth.items():
        many = torch.tensor(places).repeat_interleave(CONTINUATIONS)
        ends = are_right(continued(policy, rollouts[many, :depth], draw))
        means = ends.view(-1, CONTINUATIONS).double().mean(1).tolist()
        for place, mean in zip(places, means, strict=True):
            rows[place][TRUE][depth] = mean
            rows[place][NOISE][depth] = mean * (1 - mean) / (CONTINUATIONS - 1)


def adding_task(folder: Path, prompts: int, seed: int) -> Task:
    """Rollouts of the policy: so many prompts to train on, and at least 16 held out; what lies in `folder` is taken."""
    splits = {"train": prompts, "val": max(16, min(64, prompts // 6))}
    paths = {split: folder / split / "a.parquet" for split in splits}
    if not all(path.exists() for path in (*paths.values(), folder / POLICY / "config.json")):
        policy = trained_policy(seed)
        policy.save_pretrained(folder / POLICY)
        for place, (split, count) in enumerate(splits.items()):
            shard(paths[split], policy, count, seed=2 * seed + place, values=split == "val")
    return Task(name=f"adding, {prompts * PEERS:,} rollouts", folder=folder, seed=seed)


def policy_task(folder: Path, prompts: int, seed: int) -> Task:
    """The same, and critics start from the policy itself, as they do for PPO."""
    task = adding_task(folder, prompts, seed)
    return replace(task, name=task.name.replace("adding", "adding, from the policy"), model=folder / POLICY)
