"""Passes over many rollouts without gradients: taking old values, judging the held-out ones."""

from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from critic_train.errors import MachineError
from critic_train.evaluation.examples import Examples
from critic_train.evaluation.judge import Judge
from critic_train.evaluation.summary_text import summary_text
from critic_train.events import Event, Progress
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.microbatches import predict_values
from critic_train.rollouts import Rollouts
from critic_train.stopping import StopRequest
from critic_train.training.dataset import ROLLOUTS_AT_ONCE, RolloutSet, RunData
from critic_train.training.divergence import diverged


class PassStoppedError(Exception):
    """A pass was asked to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """A critic as it stands, to go through rollouts with.

    Attributes:
        critic: on its device.
        step: optimizer steps it has taken, for the message of a critic that has diverged.
        forest: lay rollouts out as a forest, or as padded rows.
        stop: looked at between micro-batches.
    """

    critic: Critic
    step: int
    forest: bool
    stop: StopRequest

    def values(self, rollouts: Rollouts, compute: Compute) -> NDArray[np.float32]:
        """The critic's value of every response token, float32 [T].

        Raises:
            DivergedError: a value is not finite.
            PassStoppedError: asked to stop.
        """
        values = predict_values(self.critic, rollouts, compute, forest=self.forest, stop=self.stop)
        if values is None:
            raise PassStoppedError
        if not np.isfinite(values).all():
            raise diverged(f"the critic predicts NaN or infinite values after step {self.step}")
        return values


def take_old_values(going: Pass, train: RolloutSet, compute: Compute, column: str, *, begun: bool) -> Iterator[Event]:
    """Keep the critic's own values as V_old at the start of an epoch, as PPO does each iteration.

    Args:
        going: the critic.
        train: the rollouts to train on.
        compute: device, precision and token budget.
        column: of the spool, where the values go; nothing is done where it stands.
        begun: whether the epoch has begun, so that the critic has moved on.

    Yields:
        Progress; nothing stands where the pass was stopped.

    Raises:
        MachineError: the values of an epoch that has begun are gone.
    """
    spool, ranks = train.spool, compute.ranks
    if ranks.broadcast(spool.has_column(column)):
        return
    if begun:
        raise MachineError(
            f"{spool.directory / column} is gone: the old values were taken when the epoch began, by a critic that "
            "has moved on since",
            hint="put the run's cache back, or start again with another --out",
        )
    yield Progress(stage="old values", done=0, total=len(train))
    done = 0
    try:
        with spool.new_column(column) if ranks.is_main else nullcontext() as writer:
            for places, rollouts in train.by_group(ROLLOUTS_AT_ONCE):
                values = going.values(rollouts, compute)
                if writer is not None:
                    writer.write(train.index[places], values)
                done += len(places)
                yield Progress(stage="old values", done=done, total=len(train))
    except PassStoppedError:
        return
    ranks.broadcast(True)  # the column stands from here on


def judge_held_out(
    going: Pass, data: RunData, compute: Compute, judge: Judge, examples: Examples
) -> Generator[Event, None, tuple[dict[str, Any], dict[str, Any]] | None]:
    """Judge the critic on the held-out rollouts.

    Args:
        going: the critic.
        data: of the run, with rollouts held out.
        compute: device, precision and token budget.
        judge: a new one, of one critic called "critic".
        examples: takes rollouts to read.

    Yields:
        Progress.

    Returns:
        What is recorded of it, the same on all ranks, and the verdict, which rank 0 alone has; None when asked to stop.
    """
    held_out, ranks = data.held_out, compute.ranks
    assert held_out is not None
    done = 0
    yield Progress(stage="evaluating", done=0, total=len(held_out))
    for _, rollouts in held_out.by_group(ROLLOUTS_AT_ONCE):
        try:
            values = {"critic": going.values(rollouts, compute)}
        except PassStoppedError:
            return None
        if ranks.is_main:
            judge.add(rollouts, values)
            examples.add(rollouts, values)
        done += len(rollouts)
        yield Progress(stage="evaluating", done=done, total=len(held_out))
    if not ranks.is_main:
        return ranks.broadcast(None), {}
    verdict = judge.verdict()
    recorded = {
        **verdict["critics"]["critic"],
        "return_histogram": verdict["return_histogram"],
        "baselines": verdict["baselines"],
    }
    return ranks.broadcast(recorded), verdict | {"words": summary_text(verdict), "examples": examples.records()}
