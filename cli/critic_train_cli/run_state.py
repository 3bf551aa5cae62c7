"""The state of a run, collected from its events; every view draws from it."""

import time
from collections.abc import Callable
from typing import Any

from critic_train.events import (
    EVALUATING,
    SOLVING_HEAD,
    CheckpointSaved,
    EvaluationEnded,
    Event,
    Progress,
    RunStarted,
    StepEnded,
)

CURVE_POINTS = 512
STEPS_AVERAGED = 50


class Curve:
    """A metric over any number of steps in bounded memory: means of equally many steps, at most 1,024 of them."""

    def __init__(self) -> None:
        self._points: list[float] = []
        self._steps_per_point = 1
        self._sum = 0.0
        self._count = 0

    def add(self, value: float | None) -> None:
        """Add the next step's value; None is left out."""
        if value is None:
            return
        self._sum += value
        self._count += 1
        if self._count < self._steps_per_point:
            return
        self._points.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._points) == 2 * CURVE_POINTS:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [(a + b) / 2 for a, b in pairs]
            self._steps_per_point *= 2

    @property
    def points(self) -> list[float]:
        """The means, in order; the last may be of fewer steps."""
        return [*self._points, self._sum / self._count] if self._count else list(self._points)


class RunState:
    """The newest of each kind of event, and the loss curve.

    Args:
        clock: seconds.

    Attributes:
        run: how the run started; None until the first step is next.
        step: steps taken, those before a resume included.
        metrics, timing: of the newest step.
        evaluation, best: the newest evaluation, and the best one since the process started.
        checkpoint: the newest.
        stage: the stage other than training that is under way, or None.
        losses: the value loss over the steps.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._created = self._began = clock()
        self._head_is_solved = False
        self._evaluation_began: float | None = None
        self._evaluations: list[float] = []
        self._steps: list[float] = []
        self.run: RunStarted | None = None
        self.step = 0
        self.metrics: dict[str, Any] = {}
        self.timing: dict[str, Any] = {}
        self.evaluation: EvaluationEnded | None = None
        self.best: EvaluationEnded | None = None
        self.checkpoint: CheckpointSaved | None = None
        self.stage: Progress | None = None
        self.losses = Curve()

    def update(self, event: Event) -> None:
        """Store what an event says. Nothing is drawn here: it is called between steps."""
        if isinstance(event, Progress):
            if event.stage == EVALUATING and event.done == 0:
                self._evaluation_began = self._clock()
            self._head_is_solved |= event.stage == SOLVING_HEAD and event.done == event.total
            self.stage = None if 0 < event.total <= event.done else event
            return
        if isinstance(event, StepEnded):
            self.step, self.metrics, self.timing = event.step, event.metrics, event.timing
            loss = event.metrics.get("value_loss")
            self.losses.add(loss if isinstance(loss, float) else None)
            seconds = event.timing.get("step_seconds")
            if isinstance(seconds, float):
                self._steps = [*self._steps[-(STEPS_AVERAGED - 1) :], seconds]
        elif isinstance(event, RunStarted):
            self.run, self.step = event, event.first_step
            self._began = self._clock()
        elif isinstance(event, EvaluationEnded):
            self.evaluation = event
            if self._evaluation_began is not None and event.step > 0:
                self._evaluations.append(self._clock() - self._evaluation_began)
            self._evaluation_began = None
            self.best = event if event.best else self.best
        elif isinstance(event, CheckpointSaved):
            self.checkpoint = event
        else:
            return
        self.stage = None

    @property
    def seconds(self) -> float:
        """Seconds since the job began."""
        return self._clock() - self._created

    @property
    def has_learned(self) -> bool:
        """Whether there is anything to save: a step since the run was started or resumed, or a value head solved."""
        return self._head_is_solved or (self.run is not None and self.step > self.run.first_step)

    @property
    def elapsed_seconds(self) -> float:
        """Seconds since training started or was resumed."""
        return self._clock() - self._began

    @property
    def left_seconds(self) -> float | None:
        """Estimated seconds to the last step and its evaluation; None before the first step.

        Steps and evaluations are timed by themselves, so that what a start takes once does not count for every step.
        """
        if self.run is None:
            return None
        left = max(self.run.total_steps - self.step, 0)
        if not self._steps:
            return None if left else 0.0
        # The first step of a start allocates, and on CUDA compiles: it counts only while there is no other.
        timed = self._steps[1:] if self.step - self.run.first_step == len(self._steps) > 1 else self._steps
        return sum(timed) / len(timed) * left + self._evaluation_seconds(timed[-1]) * self._evaluations_left()

    def _evaluation_seconds(self, step_seconds: float) -> float:
        """What an evaluation takes: as those before, or from a step's rate: a forward pass is a third of a step."""
        if self._evaluations:
            return sum(self._evaluations) / len(self._evaluations)
        held_out = self.run.summary.get("held_out_rollouts") if self.run else None
        rollouts = self.metrics.get("rollouts")
        return step_seconds / 3 * held_out / rollouts if held_out and rollouts else 0.0

    def _evaluations_left(self) -> int:
        """Evaluations still to come: every `eval_every` steps, and after the last."""
        every = self.run.summary.get("eval_every") if self.run else None
        if self.run is None or not every or not self.run.summary.get("held_out_rollouts"):
            return 0
        total = self.run.total_steps
        to_come: int = total // every - self.step // every + (total % every > 0)
        return to_come + (self.step > 0 and self.step % every == 0 and not self._is_evaluated)

    @property
    def _is_evaluated(self) -> bool:
        return self.evaluation is not None and self.evaluation.step == self.step

    @property
    def epoch(self) -> tuple[int, int, int, int]:
        """(epoch counted from 1, number of epochs, steps taken in it, steps of it)."""
        plan = self.run.steps_per_epoch if self.run else []
        before = 0
        for index, steps in enumerate(plan):
            if self.step <= before + steps or index == len(plan) - 1:
                return index + 1, len(plan), min(self.step - before, steps), steps
            before += steps
        return 1, 1, self.step, self.step
