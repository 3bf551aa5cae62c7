"""Which rollouts each step of a run trains on: a pure function of the settings and the rollouts."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from critic_train.data.order import EpochPlan, epoch_plan
from critic_train.settings import FitSettings

DEFAULT_EPOCHS = 3
EVALUATIONS_A_RUN = 10
WARMUP_SHARE = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """The steps of a whole run.

    Attributes:
        epochs: the order and the mini-batches of each epoch.
        total_steps: optimizer steps of the run; the last epoch may be cut short by --max-steps.
        eval_every: steps between evaluations.
        warmup_steps: steps over which the learning rate rises.
    """

    epochs: list[EpochPlan]
    total_steps: int
    eval_every: int
    warmup_steps: int

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, mini-batch within it) of the step that follows `step` steps; (epochs, 0) past the last."""
        for epoch, plan in enumerate(self.epochs):
            if step < len(plan.bounds) - 1:
                return epoch, step
            step -= len(plan.bounds) - 1
        return len(self.epochs), step

    def mini_batch(self, epoch: int, number: int) -> NDArray[np.int64]:
        """int64 [n], places of a mini-batch's rollouts in the training set."""
        plan = self.epochs[epoch]
        return plan.order[plan.bounds[number] : plan.bounds[number + 1]]

    @property
    def steps_per_epoch(self) -> list[int]:
        """Mini-batches of each epoch."""
        return [len(plan.bounds) - 1 for plan in self.epochs]


def make_plan(settings: FitSettings, groups: NDArray[np.int64]) -> TrainingPlan:
    """Plan all epochs ahead.

    Args:
        settings: batch size, seed, and how long to train.
        groups: int64 [n], the prompt group of every rollout to train on.
    """
    wanted = settings.epochs or (None if settings.max_steps else DEFAULT_EPOCHS)
    epochs: list[EpochPlan] = []
    steps = 0
    while (wanted is None or len(epochs) < wanted) and (settings.max_steps is None or steps < settings.max_steps):
        epochs.append(epoch_plan(groups, batch_size=settings.batch_size, seed=settings.seed, epoch=len(epochs)))
        steps += len(epochs[-1].bounds) - 1
    total = min(steps, settings.max_steps or steps)
    warmup = settings.warmup_steps
    return TrainingPlan(
        epochs=epochs,
        total_steps=total,
        eval_every=settings.eval_every or max(1, total // EVALUATIONS_A_RUN),
        warmup_steps=min(total, round(WARMUP_SHARE * total) if warmup is None else warmup),
    )
