"""Where a run stands.

The token budget over a run's stops: where memory ran out once, a resumed run starts with what was enough.

Which rollouts each step of a run trains on: a pure function of the settings and the rollouts.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from critic_train.data.order import EpochPlan, epoch_plan, steps_of_epoch
from critic_train.model.compute import Compute
from critic_train.settings import FitSettings


@dataclass(slots=True, kw_only=True)
class Position:
    """Where a run stands; all that a checkpoint needs to remember besides weights and moments.

    No random state is kept because none is used: the order of the rollouts is a function of (seed, epoch), dropout
    is off, and initial weights are drawn once from the seed.

    Attributes:
        step: optimizer steps taken.
        evaluated_step: the step of the last evaluation, -1 before the first.
        best_step: the step with the best held-out figure (`--best-by`) so far, None while there is none.
        best_figure: that figure.
        evaluations_since_best: evaluations after it; after step 0 while there is none.
        metrics_bytes: length of metrics.jsonl at the checkpoint.
        skips: steps left out so far because their loss or gradient was not finite.
    """

    step: int = 0
    evaluated_step: int = -1
    best_step: int | None = None
    best_figure: float | None = None
    evaluations_since_best: int = 0
    metrics_bytes: int = 0
    skips: int = 0

    @classmethod
    def of(cls, record: dict[str, Any], total_steps: int) -> "Position":
        """The position that a checkpoint recorded. Raises TypeError or ValueError where it is none."""
        position = cls(**record)
        counts = (position.step, position.metrics_bytes, position.skips, position.evaluations_since_best)
        if not all(type(count) is int and count >= 0 for count in counts) or type(position.evaluated_step) is not int:
            raise ValueError("a count that is no whole number")
        if position.step > total_steps:
            raise ValueError(f"step {position.step} of a run of {total_steps}")
        if not isinstance(position.best_step, int | None) or not isinstance(position.best_figure, float | int | None):
            raise ValueError("a best step or figure that is no number")
        return position


def budget_record(settings: FitSettings, compute: Compute) -> dict[str, int]:
    """What a checkpoint remembers of it.

    `asked` is --max-tokens and `max_tokens` what memory had room for, on each of `ranks` processes.
    """
    return {"asked": settings.compute.max_tokens, "max_tokens": compute.max_tokens, "ranks": compute.ranks.size}


def restore_token_budget(record: dict[str, Any] | None, settings: FitSettings, compute: Compute) -> str:
    """Lower `compute.max_tokens` to what a checkpoint remembers.

    Another --max-tokens than before is taken at its word, and so is the same one on another number of ranks: each then
    holds another part of the weights.

    Args:
        record: of `budget_record`; None where the checkpoint has none.
        settings: of this start.
        compute: its `max_tokens` is lowered.

    Returns:
        What to tell the user; nothing where nothing was lowered.

    Raises:
        KeyError, TypeError, ValueError: it is no such record.
    """
    if record is None:
        return ""
    asked, lowered, size = (record[name] for name in ("asked", "max_tokens", "ranks"))
    if not all(type(number) is int and number > 0 for number in (asked, lowered, size)):
        raise ValueError("a token budget that is no whole number")
    if (asked, size) != (settings.compute.max_tokens, compute.ranks.size) or lowered >= compute.max_tokens:
        return ""
    compute.start_at(lowered)
    return (
        f"memory ran out with {asked:,} tokens at once before: starting with {lowered:,}; the result is the same. "
        f"Any other --max-tokens than {asked} is tried as it is"
    )


DEFAULT_EPOCHS = 3
EVALUATIONS_A_RUN = 10
WARMUP_SHARE = 0.03


class TrainingPlan:
    """The steps of a whole run. How many there are is known ahead; an epoch's order is made when it is asked for.

    Args:
        groups: int64 [n], the prompt group of every rollout to train on.
        batch_size: the most rollouts a mini-batch may have.
        seed: of the run.
        epochs: passes over the rollouts; None for as many as `max_steps` needs.
        max_steps: where the run ends at the latest; None for the end of the last epoch.
        eval_every: steps between evaluations; None for a tenth of the run.
        warmup_steps: steps over which the learning rate rises; None for 3 % of the run.

    Attributes:
        total_steps: optimizer steps of the run; the last epoch may be cut short by `max_steps`.
        eval_every: resolved.
        warmup_steps: resolved.
        steps_per_epoch: mini-batches of each epoch, the last one's whole.
    """

    def __init__(
        self,
        groups: NDArray[np.int64],
        *,
        batch_size: int,
        seed: int,
        epochs: int | None,
        max_steps: int | None,
        eval_every: int | None = None,
        warmup_steps: int | None = None,
    ) -> None:
        self._groups = groups
        self._batch_size = batch_size
        self._seed = seed
        self.steps_per_epoch = list(self._steps_per_epoch(epochs, max_steps))
        self._first_steps = np.cumsum([0, *self.steps_per_epoch]).tolist()
        self._newest: tuple[int, EpochPlan] | None = None
        steps = self._first_steps[-1]
        self.total_steps = min(steps, max_steps or steps)
        self.eval_every = eval_every or max(1, self.total_steps // EVALUATIONS_A_RUN)
        wanted = round(WARMUP_SHARE * self.total_steps) if warmup_steps is None else warmup_steps
        self.warmup_steps = min(self.total_steps, wanted)

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, mini-batch within it) of the step that follows `step` steps; (epochs, 0) past the last."""
        epoch = bisect_right(self._first_steps, step) - 1
        return epoch, step - self._first_steps[epoch]

    def mini_batch(self, epoch: int, number: int) -> NDArray[np.int64]:
        """int64 [n], places of a mini-batch's rollouts in the training set."""
        if self._newest is None or self._newest[0] != epoch:
            self._newest = epoch, epoch_plan(self._groups, batch_size=self._batch_size, seed=self._seed, epoch=epoch)
        plan = self._newest[1]
        return plan.order[plan.bounds[number] : plan.bounds[number + 1]]

    def _steps_per_epoch(self, epochs: int | None, max_steps: int | None) -> Iterator[int]:
        sizes = np.unique(self._groups, return_counts=True)[1].astype(np.int64)
        epoch = steps = 0
        while (epochs is None or epoch < epochs) and (max_steps is None or steps < max_steps):
            found = steps_of_epoch(sizes, batch_size=self._batch_size, seed=self._seed, epoch=epoch)
            yield found
            epoch, steps = epoch + 1, steps + found


def make_plan(settings: FitSettings, groups: NDArray[np.int64]) -> TrainingPlan:
    """The plan of a run.

    Args:
        settings: batch size, seed, and how long to train.
        groups: int64 [n], the prompt group of every rollout to train on.
    """
    return TrainingPlan(
        groups,
        batch_size=settings.optimizer.batch_size,
        seed=settings.optimizer.seed,
        epochs=settings.optimizer.epochs or (None if settings.optimizer.max_steps else DEFAULT_EPOCHS),
        max_steps=settings.optimizer.max_steps,
        eval_every=settings.run.eval_every,
        warmup_steps=settings.optimizer.warmup_steps,
    )
