"""Which rollouts each step of a run trains on: a pure function of the settings and the rollouts."""

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from critic_train.data.order import EpochPlan, epoch_plan, steps_of_epoch
from critic_train.prefetch import ReadAhead
from critic_train.rollouts import Rollouts
from critic_train.settings import OptimizerSettings
from critic_train.training.dataset import RolloutSet
from critic_train.training.targets import Targets

DEFAULT_EPOCHS = 3
EVALUATIONS_PER_RUN = 10
WARMUP_SHARE = 0.03


class TrainingPlan:
    """The steps of a run. Their number is computed at once, an epoch's order when it is first needed.

    Args:
        groups: int64 [n], what stays together, of every rollout to train on: its prompt group, or a number of its own.
        batch_size: the most rollouts a mini-batch may have.
        seed: of the run.
        epochs: passes over the rollouts, 0 for none; None for as many as `max_steps` needs.
        max_steps: the most steps the run may take; None for all steps of its epochs.
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
        self.eval_every = eval_every or max(1, self.total_steps // EVALUATIONS_PER_RUN)
        wanted = round(WARMUP_SHARE * self.total_steps) if warmup_steps is None else warmup_steps
        self.warmup_steps = min(self.total_steps, wanted)

    @property
    def passes(self) -> float:
        """Over the rollouts, in all."""
        return self.total_steps / self.steps_per_epoch[0] if self.total_steps else 0.0

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, mini-batch within it) of the step that follows `step` steps; (epochs, 0) past the last."""
        epoch = bisect_right(self._first_steps, step) - 1
        return epoch, step - self._first_steps[epoch]

    def mini_batch(self, epoch: int, number: int) -> NDArray[np.int64]:
        """int64 [n], the indices of a mini-batch's rollouts in the training set."""
        if self._newest is None or self._newest[0] != epoch:
            self._newest = epoch, epoch_plan(self._groups, batch_size=self._batch_size, seed=self._seed, epoch=epoch)
        plan = self._newest[1]
        return plan.order[plan.bounds[number] : plan.bounds[number + 1]]

    def _steps_per_epoch(self, epochs: int | None, max_steps: int | None) -> Iterator[int]:
        sizes = np.unique(self._groups, return_counts=True)[1].astype(np.int64)
        epoch = steps = 0
        while (epochs is None or epoch < epochs) and (max_steps is None or steps < max_steps):
            in_epoch = steps_of_epoch(sizes, batch_size=self._batch_size, seed=self._seed, epoch=epoch)
            yield in_epoch
            epoch, steps = epoch + 1, steps + in_epoch


def make_plan(settings: OptimizerSettings, groups: NDArray[np.int64], eval_every: int | None) -> TrainingPlan:
    """The plan of a run.

    Args:
        settings: batch size, what is shuffled, seed, and how long to train.
        groups: int64 [n], the prompt group of every rollout to train on.
        eval_every: --eval-every.
    """
    return TrainingPlan(
        np.arange(len(groups)) if settings.shuffle == "rollouts" else groups,
        batch_size=settings.batch_size,
        seed=settings.seed,
        epochs=DEFAULT_EPOCHS if settings.epochs is None and settings.max_steps is None else settings.epochs,
        max_steps=settings.max_steps,
        eval_every=eval_every,
        warmup_steps=settings.warmup_steps,
    )


class MiniBatches:
    """The mini-batches of a run; the next one is read in the background while this one is trained on.

    Args:
        train: the rollouts to train on.
        plan: which of them each step takes.
        targets: what the returns are made of.
        values_per_epoch: whether V_old of each epoch is a column of its own, which is there once the epoch has begun.
    """

    def __init__(self, train: RolloutSet, plan: TrainingPlan, targets: Targets, *, values_per_epoch: bool) -> None:
        self._train = train
        self._plan = plan
        self._targets = targets
        self._values_per_epoch = values_per_epoch
        self._reader: ReadAhead[tuple[int, int], Rollouts] = ReadAhead(self._read)

    def load(self, step: int) -> Rollouts:
        """The rollouts of the step that follows `step` steps, with the returns and V_old of its epoch."""
        return self._targets.in_epoch(self._reader.get(self._plan.locate(step), self._next(step)))

    def close(self) -> None:
        """End the background thread."""
        self._reader.close()

    def _next(self, step: int) -> tuple[int, int] | None:
        """(epoch, mini-batch) of the step after this one, None where it cannot be read yet."""
        if step + 1 >= self._plan.total_steps:
            return None
        epoch, number = self._plan.locate(step + 1)
        # V_old of the next epoch will be those of the critic when this epoch has ended.
        waits = self._values_per_epoch and epoch != self._plan.locate(step)[0]
        return None if waits else (epoch, number)

    def _read(self, batch: tuple[int, int]) -> Rollouts:
        epoch, number = batch
        column = old_values_column(epoch) if self._values_per_epoch else None
        return self._train.read(self._plan.mini_batch(epoch, number), values_from=column)


def old_values_column(epoch: int) -> str:
    """The column of the rollout cache that holds V_old of an epoch (--old-values epoch)."""
    return f"old_values-epoch-{epoch}"
