"""--old-values epoch: V_old are the critic's own values at the start of each epoch, as in each iteration of PPO."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

from critic_train.errors import MachineError
from critic_train.events import Event, Progress
from critic_train.training.dataset import ROLLOUTS_PER_PASS, RolloutSet
from critic_train.training.plan import old_values_column
from critic_train.training.state import CriticRuntime


@dataclass(frozen=True, slots=True, kw_only=True)
class OldValues:
    """Predicts V_old of every epoch and keeps them as columns of the rollout cache.

    Attributes:
        runtime: the critic that is trained.
        train: the rollouts to train on.
    """

    runtime: CriticRuntime
    train: RolloutSet

    def take(self, epoch: int, *, begun: bool, step: int) -> Iterator[Event]:
        """Predict V_old of an epoch, unless its column is there. All ranks call it.

        Args:
            epoch: the one that the next step belongs to.
            begun: whether steps of the epoch were taken already, so that the critic is no longer that of its start.
            step: optimizer steps taken.

        Yields:
            Progress.

        Raises:
            MachineError: the column of an epoch that has begun is gone.
            Stopped: asked to stop; no column is written.
        """
        cache, ranks, column = self.train.cache, self.runtime.compute.ranks, old_values_column(epoch)
        if ranks.broadcast(cache.has_column(column)):
            return
        if begun:
            raise MachineError(
                f"{cache.directory / column} is gone: the old values were taken when the epoch began, by a critic that "
                "has moved on since",
                hint="put the run's cache back, or start again with another --out",
            )
        done, total = 0, len(self.train)
        yield Progress(stage="old values", done=0, total=total)
        with cache.new_column(column) if ranks.is_main else nullcontext() as writer:
            for index, rollouts in self.train.by_group(ROLLOUTS_PER_PASS):
                values = yield from self.runtime.values(
                    rollouts, step=step, stage="old values", before=done, total=total
                )
                if writer is not None:
                    writer.write(self.train.index[index], values)
                done += len(index)
                yield Progress(stage="old values", done=done, total=total)
        ranks.broadcast(True)  # the others read the column only now that it is in its place

    def drop_before(self, epoch: int) -> None:
        """Remove the columns of all epochs before this one, from which no checkpoint resumes any more."""
        for earlier in range(epoch):
            self.train.cache.drop_column(old_values_column(earlier))
