"""How good a critic each recipe gives on worlds whose values are known, and what it costs.

A hidden Markov chain emits tokens, and a coin whose odds are the last state's payoff is the return. The value of a
prefix follows exactly by the forward filter, so that a critic's squared distance from it is free of the returns' noise:
a share of the ceiling is 1 - E(V - V*)^2 / Var(V*), overall and, of what is left within prompts, within them. Beside
the recipes stands a yardstick: a padded token classifier of the same size, with a head drawn from N(0, 0.02) and verl's
loss, optimizer and constant learning rate, as a plain loop over transformers' own class.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from transformers import LlamaForTokenClassification

from bench.entry import Options, Table
from critic_train.events import RunEnded
from critic_train.inference import load_critic
from critic_train.model_files.config import LEARNING_RATES, preset_config
from critic_train.settings import FitSettings
from critic_train.training.fit import fit

NAME = "quality"
TITLE = "Critics of known worlds: share of the ceiling, CPU seconds"
DEVICES = ("cpu",)

STATES, SYMBOLS, FIRST_ID = 10, 62, 2
PROMPTS, RESPONSES = (4, 64), (12, 96)
"""Shortest and longest, in tokens."""
PEERS = 8
GOES_ON = 0.96
"""The odds, after each response token past the shortest response, that another one follows."""

SIZES = {"quick": (16, [0]), "usual": (768, [0, 1, 2]), "full": (6144, [0, 1, 2])}
"""Prompts to train on, and seeds of worlds."""
RECIPES: dict[str, dict[str, Any]] = {
    "all defaults": {},
    "without next-token loss": {"lm_loss_weight": 0.0},
    "3 epochs": {"epochs": 3},
    "--recipe verl": {"recipe": "verl"},
}


class World:
    """A slow chain whose states look different and pay differently.

    Args:
        seed: of the chain.
    """

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.move = 0.9 * np.eye(STATES) + 0.1 * draw.dirichlet(np.ones(STATES), STATES)
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

    def shard(self, path: Path, prompts: int, seed: int) -> pa.Table:
        """Write and return rollouts of so many prompts, PEERS of each; `true_values` beside what critics are given."""
        draw, rows = np.random.default_rng(seed), list[dict[str, Any]]()
        for number in range(prompts):
            state, belief, prompt = int(draw.integers(STATES)), np.full(STATES, 1 / STATES), list[int]()
            for _ in range(int(draw.integers(*PROMPTS))):
                state, token, belief = self.step(draw, state, belief)
                prompt.append(token)
            for _ in range(PEERS):
                hidden = int(draw.choice(STATES, p=belief))  # what the prompt leaves open
                ids, values, outcome = self.rollout(draw, prompt, hidden, belief)
                mask = [False] * len(prompt) + [True] * len(values)
                rows.append(
                    {
                        "uid": str(number),
                        "input_ids": ids,
                        "response_mask": mask,
                        "returns": [outcome] * len(ids),
                        "true_values": [0.0] * len(prompt) + values,
                    }
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, path)
        return table


def run(options: Options) -> Table:
    """Train every recipe on every world; means over the worlds, and the least of them."""
    table = Table(
        columns={"recipe": "", "of the ceiling": ".3f", "least": ".3f", "within prompts": ".3f", "CPU seconds": ".1f"}
    )
    prompts, seeds = SIZES[options.size]
    trainers: dict[str, Callable[[Path, int], Any]] = {
        name: lambda folder, seed, given=given: product(folder, seed, given)  # type: ignore[misc]
        for name, given in RECIPES.items()
    }
    trainers["yardstick, 3 epochs"] = yardstick
    for name, train in trainers.items():
        found, seconds = [], []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                world = World(seed)
                world.shard(Path(folder, "train", "a.parquet"), prompts, seed=2 * seed)
                held_out = world.shard(Path(folder, "val", "a.parquet"), max(16, prompts // 6), seed=2 * seed + 1)
                began = time.process_time()
                predict = train(Path(folder), seed)
                seconds.append(time.process_time() - began)
                found.append(shares(held_out, predict(held_out)))
        overall, within = np.array(found).T
        row = {"of the ceiling": overall.mean(), "least": overall.min(), "within prompts": within.mean()}
        table.rows.append({"recipe": name, **row, "CPU seconds": float(np.mean(seconds))})
    table.notes.append(
        f"{prompts * PEERS:,} rollouts of each of {len(seeds)} worlds; shares are free of the returns' noise."
    )
    return table


def shares(held_out: pa.Table, values: NDArray[np.float64]) -> tuple[float, float]:
    """(share of the ceiling, share of what is left within prompts), given the values of all response tokens."""
    mask = np.concatenate([np.asarray(row) for row in held_out["response_mask"].to_pylist()])
    true = np.concatenate([np.asarray(row) for row in held_out["true_values"].to_pylist()])[mask]
    lengths = [len(row) for row in held_out["input_ids"].to_pylist()]
    group = np.repeat([int(uid) for uid in held_out["uid"].to_pylist()], lengths)[mask]

    def centred(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        means: NDArray[np.float64] = np.bincount(group, numbers) / np.bincount(group)
        within: NDArray[np.float64] = numbers - means[group]
        return within

    overall = 1 - float(np.var(values - true) / np.var(true))
    return overall, 1 - float(np.var(centred(values) - centred(true)) / np.var(centred(true)))


def product(folder: Path, seed: int, given: dict[str, Any]) -> Callable[[pa.Table], NDArray[np.float64]]:
    """`fit`, and its best checkpoint's values."""
    paths = {"data": [str(folder / "train")], "val_data": [str(folder / "val")], "out": str(folder / "run")}
    settings = FitSettings(**paths, old_values="none", seed=seed, no_report=True, device="cpu", **given)
    ended = [event for event in fit(settings) if isinstance(event, RunEnded)][-1]
    critic = load_critic(ended.result["best"], device="cpu")

    def predict(held_out: pa.Table) -> NDArray[np.float64]:
        prompts = [row.index(True) for row in held_out["response_mask"].to_pylist()]
        return np.concatenate(critic.values(held_out["input_ids"].to_pylist(), prompts)).astype(np.float64)

    return predict


def yardstick(folder: Path, seed: int) -> Callable[[pa.Table], NDArray[np.float64]]:
    """A token classifier on padded rows: squared error, token-mean, AdamW at a constant rate, 64 rollouts a step."""
    torch.manual_seed(seed)
    config = preset_config("tiny", max_token_id=FIRST_ID + SYMBOLS - 1, max_length=PROMPTS[1] + RESPONSES[1])
    config.num_labels = 1
    model = LlamaForTokenClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATES["tiny"], weight_decay=0.01)

    def values_of(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.bool)
        attention = torch.zeros(len(rows), width, dtype=torch.int64)
        for number, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[number, :length], mask[number, :length] = (
                torch.tensor(row["input_ids"]),
                torch.tensor(row["response_mask"]),
            )
            attention[number, :length] = 1
        scores = model(input_ids=ids, attention_mask=attention).logits[..., 0]
        return scores[:, :-1][mask[:, 1:]], mask

    rows = pq.read_table(folder / "train").to_pylist()
    for _ in range(3):
        for part in torch.randperm(len(rows)).split(64):
            batch = [rows[number] for number in part.tolist()]
            values, mask = values_of(batch)
            returns = torch.tensor([row["returns"][-1] for row in batch])
            loss = 0.5 * (values - returns.repeat_interleave(mask.sum(1))).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def predict(held_out: pa.Table) -> NDArray[np.float64]:
        every = held_out.to_pylist()
        parts = [values_of(every[start : start + 64])[0].numpy() for start in range(0, len(every), 64)]
        return np.concatenate(parts).astype(np.float64)

    return predict
