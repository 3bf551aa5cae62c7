"""Rollouts whose values are known, and how close a critic comes to them.

A `Task` is a folder with `train` and `val`. In a drawn chain the value of every prefix follows exactly; of an adding
policy (`bench.adding`) the values of some prefixes are sampled. Where values are known a critic's squared distance from
them is free of the returns' noise: a share of the ceiling is 1 - Var(V - V*) / Var(V*) over the held-out response
tokens, overall; and within prompts, where each prompt's mean over these tokens is first taken off V and V*.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

STATES, SYMBOLS, FIRST_ID = 10, 62, 2
PROMPTS, RESPONSES = (4, 64), (12, 96)
"""Shortest and longest, in tokens."""
PEERS = 8
STAYS = 0.993
"""The odds that the chain stays in its state: with 0.9, the last state is next to unknown before the end."""
GOES_ON = 0.96
"""The odds, after each response token past the shortest response, that another one follows."""

TRUE, NOISE = "true_values", "true_values_variance"
"""Columns: the value of the state in which each token is chosen, NaN where it is not known; and, where values are
means of sampled returns, the variance of each mean."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rollouts to train on and to hold out.

    Attributes:
        name: for a person.
        folder: with `train` and `val`.
        model: what critics start from; None for a new transformer.
        seed: of whatever is drawn in training.
    """

    name: str
    folder: Path
    model: Path | None = None
    seed: int = 0

    def held_out(self) -> pa.Table:
        """The held-out rollouts."""
        return pq.read_table(self.folder / "val")


class World:
    """A slow hidden Markov chain whose states look different and pay differently.

    It emits tokens, and a coin whose odds are the last state's payoff is the return. The value of a prefix follows
    exactly by the forward filter.

    Args:
        seed: of the chain.
    """

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.move = STAYS * np.eye(STATES) + (1 - STAYS) * draw.dirichlet(np.ones(STATES), STATES)
        self.emit = draw.dirichlet(0.3 * np.ones(SYMBOLS), STATES)
        self.payoff = np.linspace(0.05, 0.95, STATES)
        # What is to be expected of each state before response token t; after the last one, its own payoff.
        self.ahead, after = np.empty((RESPONSES[1], STATES)), self.payoff
        for t in reversed(range(RESPONSES[1])):
            self.ahead[t] = self.move @ after
            after = self.ahead[t] if t < RESPONSES[0] else (1 - GOES_ON) * self.payoff + GOES_ON * self.ahead[t]

    def rollout(self, draw: np.random.Generator, prompt: list[int], state: int, belief: NDArray[np.float64]) -> Any:
        """(ids of the response, true values, return) of one response."""
        ids, values = list[int](), list[float]()
        while True:
            values.append(float(belief @ self.ahead[len(ids)]))
            state, token, belief = self.step(draw, state, belief)
            ids.append(token)
            if len(ids) == RESPONSES[1] or (len(ids) >= RESPONSES[0] and draw.random() > GOES_ON):
                return prompt + ids, values, float(draw.random() < self.payoff[state])

    def step(
        self, draw: np.random.Generator, state: int, belief: NDArray[np.float64]
    ) -> tuple[int, int, NDArray[np.float64]]:
        """(state, id, belief) one token on."""
        state = int(draw.choice(STATES, p=self.move[state]))
        symbol = int(draw.choice(SYMBOLS, p=self.emit[state]))
        belief = (belief @ self.move) * self.emit[:, symbol]
        return state, FIRST_ID + symbol, belief / belief.sum()

    def shard(self, path: Path, prompts: int, seed: int) -> None:
        """Write rollouts of so many prompts, PEERS of each; the true values beside what critics are given."""
        draw, rows = np.random.default_rng(seed), list[dict[str, Any]]()
        for number in range(prompts):
            state, belief, prompt = int(draw.integers(STATES)), np.full(STATES, 1 / STATES), list[int]()
            for _ in range(int(draw.integers(*PROMPTS))):
                state, token, belief = self.step(draw, state, belief)
                prompt.append(token)
            for _ in range(PEERS):
                hidden = int(draw.choice(STATES, p=belief))  # what the prompt leaves open
                ids, values, outcome = self.rollout(draw, prompt, hidden, belief)
                rows.append(row(f"{seed}-{number}", ids, len(prompt), outcome) | {TRUE: [0.0] * len(prompt) + values})
        write_rows(path, rows)


def row(uid: str, ids: list[int], prompt: int, outcome: float) -> dict[str, Any]:
    """One rollout as a shard holds it, its outcome the return of every response token."""
    mask = [False] * prompt + [True] * (len(ids) - prompt)
    returns = [outcome] * len(ids)
    return {"uid": uid, "input_ids": ids, "response_mask": mask, "reward": outcome, "returns": returns}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def chain_task(folder: Path, prompts: int, seed: int) -> Task:
    """A drawn chain with so many prompts to train on, and at least 16 held out; what lies in `folder` is taken."""
    world = World(seed)
    for place, (split, count) in enumerate({"train": prompts, "val": max(16, prompts // 6)}.items()):
        path = folder / split / "a.parquet"
        if not path.exists():
            world.shard(path, count, seed=2 * seed + place)
    return Task(name=f"chain, {prompts * PEERS:,} rollouts", folder=folder, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How much of the true values, or of the returns, some values explain.

    Attributes:
        overall: of the variance of all.
        within: the same of what is left of both when each prompt's mean over the response tokens is taken off.
    """

    overall: float
    within: float


def shares(held_out: pa.Table, values: NDArray[np.float64]) -> Shares | None:
    """Shares of the ceiling; None where no true values are known.

    Args:
        held_out: with a column of true values.
        values: float64 [M], of all response tokens.
    """
    if TRUE not in held_out.column_names:
        return None
    mask = _flat(held_out, "response_mask").astype(bool)
    true = _flat(held_out, TRUE)[mask]
    variance = _flat(held_out, NOISE)[mask] if NOISE in held_out.column_names else np.zeros(len(true))
    group = _prompts(held_out)
    known = np.isfinite(true)
    true, variance, group, error = true[known], variance[known], group[known], (values - true)[known]
    counts = np.bincount(group)
    # Noise of sampled values is in the error and in the true values alike; a prompt's mean takes a part of it.
    left = variance * (1 - 1 / counts[group])
    noise, noise_within = float(variance.mean()), float(left.mean())
    error_within, true_within = (float(np.var(_centred(numbers, group))) for numbers in (error, true))
    return Shares(
        overall=1 - (float(np.var(error)) - noise) / (float(np.var(true)) - noise),
        within=1 - (error_within - noise_within) / (true_within - noise_within),
    )


def explained(held_out: pa.Table, values: NDArray[np.float64]) -> Shares:
    """Explained variance of the returns, noise and all, overall and within prompts (NaN: they do not vary there).

    Args:
        held_out: the rollouts.
        values: float64 [M], of all response tokens.
    """
    returns, group = response_returns(held_out), _prompts(held_out)
    left = [returns - values, returns, _centred(returns - values, group), _centred(returns, group)]
    error, noise, error_within, noise_within = (float(np.var(numbers)) for numbers in left)
    return Shares(overall=1 - error / noise, within=1 - error_within / noise_within if noise_within else np.nan)


def ceiling(held_out: pa.Table) -> Shares | None:
    """What the true values explain of the returns; None where they are not known of all response tokens."""
    if TRUE not in held_out.column_names:
        return None
    true = _flat(held_out, TRUE)[_flat(held_out, "response_mask").astype(bool)]
    return explained(held_out, true) if np.isfinite(true).all() else None


def _prompts(held_out: pa.Table) -> NDArray[np.int64]:
    """int64 [M]: the number of each response token's prompt."""
    _, prompt = np.unique(held_out["uid"].to_pylist(), return_inverse=True)
    mask = _flat(held_out, "response_mask").astype(bool)
    numbers: NDArray[np.int64] = np.repeat(prompt, [len(ids) for ids in held_out["input_ids"].to_pylist()])[mask]
    return numbers


def _centred(numbers: NDArray[np.float64], group: NDArray[np.int64]) -> NDArray[np.float64]:
    """Numbers less their group's mean."""
    means = np.bincount(group, numbers) / np.maximum(np.bincount(group), 1)
    centred: NDArray[np.float64] = numbers - means[group]
    return centred


def _flat(table: pa.Table, column: str) -> NDArray[np.float64]:
    found: NDArray[np.float64] = table[column].combine_chunks().flatten().cast(pa.float64()).to_numpy()
    return found


def response_returns(held_out: pa.Table) -> NDArray[np.float64]:
    """float64 [M], the return of every response token."""
    found: NDArray[np.float64] = _flat(held_out, "returns")[_flat(held_out, "response_mask").astype(bool)]
    return found
