"""Which rollouts each step of a run trains on: a pure function of the settings and the rollouts."""

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from critic_train.data.order import EpochPlan, epoch_plan, steps_of_epoch
from critic_train.settings import FitSettings

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
        batch_size=settings.batch_size,
        seed=settings.seed,
        epochs=settings.epochs or (None if settings.max_steps else DEFAULT_EPOCHS),
        max_steps=settings.max_steps,
        eval_every=settings.eval_every,
        warmup_steps=settings.warmup_steps,
    )
