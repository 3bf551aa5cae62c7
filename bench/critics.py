"""The critics that `bench quality` and `bench ablation` compare: this program's, and what people write today.

The yardstick is a padded token classifier of the same size with a head drawn from N(0, 0.02), trained as verl trains:
squared error over all response tokens, AdamW at a constant learning rate, 64 rollouts a step in random order, 3 epochs;
verl's rate where there is a model to start from, and that of `fit` where a new transformer would not learn at that.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForTokenClassification

from bench.worlds import Shares, Task, explained, shares
from critic_train.events import EvaluationEnded, RunEnded, RunStarted
from critic_train.inference import load_critic
from critic_train.model_files.config import LEARNING_RATES, preset_config
from critic_train.settings import FitSettings, Preset
from critic_train.training.fit import fit

VERL_RATE = 1e-5
BATCH, EPOCHS, LOOKS = 64, 3, 3
"""Rollouts a step of the yardstick, its epochs, and how often it is evaluated in each."""
ROWS_AT_ONCE = 16


@dataclass(kw_only=True)
class Trained:
    """How a critic came out.

    Attributes:
        seconds: CPU seconds in all; of the yardstick those of its steps, not of its evaluations.
        epochs: passes over the rollouts.
        curve: (CPU seconds until an evaluation, held-out explained variance of the returns), in order.
        within: explained variance within prompts, of the best evaluation.
        shares: of the best evaluation; None where no true values are known.
    """

    seconds: float = 0.0
    epochs: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)
    within: float = 0.0
    shares: Shares | None = None

    @property
    def best(self) -> tuple[float, float]:
        """(CPU seconds until it, explained variance) of the best evaluation."""
        return max(self.curve, key=lambda point: point[1])

    def seconds_to(self, explained_variance: float) -> float | None:
        """CPU seconds until an evaluation finds so much; None where none does."""
        return next((seconds for seconds, found in self.curve if found >= explained_variance), None)


_KEPT: dict[tuple[Task, str], Trained] = {}
"""What was trained so far: `quality` and `ablation` share the defaults where both are measured."""


def product(task: Task, given: dict[str, Any]) -> Trained:
    """`fit` with all defaults but what is given; everything it does counts, evaluations too."""
    key = (task, repr(given))
    if key not in _KEPT:
        _KEPT[key] = _fitted(task, given)
    return _KEPT[key]


def _fitted(task: Task, given: dict[str, Any]) -> Trained:
    found, began = Trained(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        settings = FitSettings(
            data=[str(task.folder / "train")],
            val_data=[str(task.folder / "val")],
            out=folder,
            model=str(task.model) if task.model else None,
            seed=task.seed,
            device="cpu",
            **{"no_report": True, **given},
        )
        best = ""
        for event in fit(settings):
            if isinstance(event, EvaluationEnded):
                found.curve.append((time.process_time() - began, event.metrics["explained_variance"]))
            elif isinstance(event, RunEnded):
                best = event.result["best"]
            elif isinstance(event, RunStarted):
                found.epochs = len(event.steps_per_epoch)
        found.seconds = time.process_time() - began
        held_out = task.held_out()
        rows = held_out["input_ids"].to_pylist()
        prompts = [mask.index(True) for mask in held_out["response_mask"].to_pylist()]
        values = np.concatenate(load_critic(best, device="cpu").values(rows, prompts)).astype(np.float64)
        found.within, found.shares = explained(held_out, values).within, shares(held_out, values)
    return found


class Yardstick:
    """A token classifier on padded rows.

    Args:
        task: what to train on, from what.
        preset: its size where it starts from no model.
        limit: the most steps to take; None for all of its epochs.
    """

    def __init__(self, task: Task, preset: Preset = "tiny", limit: int | None = None) -> None:
        torch.manual_seed(task.seed)
        self.task, self.limit = task, limit
        self.rows = pq.read_table(task.folder / "train").to_pylist()
        held_out = task.held_out()
        self.held_out: pa.Table = held_out
        if task.model:
            config = AutoConfig.from_pretrained(task.model)
            config.num_labels, config.classifier_dropout = 1, 0.0
            self.model: Any = AutoModelForTokenClassification.from_pretrained(
                task.model, config=config, dtype=torch.float32
            )
        else:
            every = [*self.rows, *held_out.to_pylist()]
            config = preset_config(
                preset,
                max_token_id=max(max(row["input_ids"]) for row in every),
                max_length=max(len(row["input_ids"]) for row in every),
            )
            config.num_labels, config.classifier_dropout = 1, 0.0
            self.model = AutoModelForTokenClassification.from_config(config)
        torch.nn.init.normal_(self.model.score.weight, std=0.02)
        self.rate = VERL_RATE if task.model else LEARNING_RATES[preset]

    def train(self) -> Trained:
        """Train it, and evaluate it along the way."""
        found, optimizer = (
            Trained(epochs=EPOCHS),
            torch.optim.AdamW(self.model.parameters(), lr=self.rate, weight_decay=0.01),
        )
        best = -np.inf
        for step, (batch, due) in enumerate(self._batches(), 1):
            began = time.process_time()
            tokens = sum(sum(row["response_mask"]) for row in batch)
            for start in range(0, len(batch), ROWS_AT_ONCE):
                part = batch[start : start + ROWS_AT_ONCE]
                squared = (self._values(part) - torch.tensor(_targets(part))).square()
                (0.5 * squared.sum() / tokens).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            found.seconds += time.process_time() - began
            if due or step == self.limit:
                values = self._predict()
                now = explained(self.held_out, values)
                found.curve.append((found.seconds, now.overall))
                if now.overall > best:
                    best, found.within, found.shares = now.overall, now.within, shares(self.held_out, values)
            if step == self.limit:
                break
        return found

    def _batches(self) -> Iterator[tuple[list[dict[str, Any]], bool]]:
        """(rollouts of a step, whether an evaluation follows)."""
        for _ in range(EPOCHS):
            parts = torch.randperm(len(self.rows)).split(BATCH)
            looks = {round(len(parts) * look / LOOKS) for look in range(1, LOOKS + 1)}
            for number, part in enumerate(parts, 1):
                yield [self.rows[place] for place in part.tolist()], number in looks

    def _values(self, rows: list[dict[str, Any]]) -> torch.Tensor:
        """float32 [M]: the value before each response token."""
        width = max(len(row["input_ids"]) for row in rows)
        ids, seen, mask = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
        for number, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[number, :length], mask[number, :length] = map(torch.tensor, (row["input_ids"], row["response_mask"]))
            seen[number, :length] = 1
        scores = self.model(input_ids=ids, attention_mask=seen, use_cache=False).logits[..., 0]
        return scores[:, :-1][mask[:, 1:].bool()]  # type: ignore[no-any-return]

    @torch.no_grad()
    def _predict(self) -> NDArray[np.float64]:
        self.model.eval()
        every = self.held_out.to_pylist()
        parts = [
            self._values(every[start : start + ROWS_AT_ONCE]).numpy() for start in range(0, len(every), ROWS_AT_ONCE)
        ]
        self.model.train()
        return np.concatenate(parts).astype(np.float64)


def _targets(rows: list[dict[str, Any]]) -> list[float]:
    """The returns of the response tokens."""
    pairs = (zip(row["returns"], row["response_mask"], strict=True) for row in rows)
    return [target for row in pairs for target, chosen in row if chosen]
