"""What a run has said so far: the state that every way of showing it draws from."""

import time
from collections.abc import Callable
from typing import Any

from critic_train.events import CheckpointSaved, EvaluationEnded, Event, Progress, RunStarted, StepEnded

CURVE_POINTS = 512


class Curve:
    """The course of a figure over any number of steps, in bounded memory: equal stretches, averaged."""

    def __init__(self) -> None:
        self._points: list[float] = []
        self._stretch = 1
        self._sum = 0.0
        self._seen = 0

    def add(self, value: float | None) -> None:
        """Take the next step's figure; a missing one is left out."""
        if value is None:
            return
        self._sum += value
        self._seen += 1
        if self._seen < self._stretch:
            return
        self._points.append(self._sum / self._seen)
        self._sum, self._seen = 0.0, 0
        if len(self._points) == 2 * CURVE_POINTS:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [(a + b) / 2 for a, b in pairs]
            self._stretch *= 2

    @property
    def points(self) -> list[float]:
        """The stretches' means, in order, the unfinished one last."""
        return [*self._points, self._sum / self._seen] if self._seen else list(self._points)


class RunState:
    """The run as its events told it.

    Attributes:
        run: how it started, None before the first step is next.
        step: steps taken, those of earlier sessions included.
        metrics, timing: of the newest step.
        evaluation: the newest one; `best` the best one of this session.
        checkpoint: the newest one.
        stage: what goes on besides steps, None when nothing does.
        losses: the value loss over the steps.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._stage_began = clock()
        self.run: RunStarted | None = None
        self.step = 0
        self.metrics: dict[str, Any] = {}
        self.timing: dict[str, Any] = {}
        self.evaluation: EvaluationEnded | None = None
        self.best: EvaluationEnded | None = None
        self.checkpoint: CheckpointSaved | None = None
        self.stage: Progress | None = None
        self.losses = Curve()

    def take(self, event: Event) -> None:
        """Remember what an event says. Called between steps, so it only stores."""
        if isinstance(event, Progress):
            if self.stage is None or self.stage.stage != event.stage:
                self._stage_began = self._clock()
            self.stage = None if 0 < event.total <= event.done else event
            return
        if isinstance(event, StepEnded):
            self.step, self.metrics, self.timing = event.step, event.metrics, event.timing
            loss = event.metrics.get("value_loss")
            self.losses.add(loss if isinstance(loss, float) else None)
        elif isinstance(event, RunStarted):
            self.run, self.step = event, event.first_step
            self._began = self._clock()
        elif isinstance(event, EvaluationEnded):
            self.evaluation = event
            self.best = event if event.best else self.best
        elif isinstance(event, CheckpointSaved):
            self.checkpoint = event
        else:
            return
        self.stage = None

    @property
    def elapsed_seconds(self) -> float:
        """Seconds since the first step of this session was next."""
        return self._clock() - self._began

    @property
    def stage_seconds(self) -> float:
        """Seconds since the stage began."""
        return self._clock() - self._stage_began

    @property
    def left_seconds(self) -> float | None:
        """Seconds to the last step at this session's pace, evaluations included; None before the first."""
        if self.run is None or self.step <= self.run.first_step:
            return None
        pace = self.elapsed_seconds / (self.step - self.run.first_step)
        return pace * max(self.run.total_steps - self.step, 0)

    @property
    def epoch(self) -> tuple[int, int, int, int]:
        """(epoch from 1, epochs, steps done in it, steps of it), by the run's own plan."""
        plan = self.run.steps_per_epoch if self.run else []
        before = 0
        for index, steps in enumerate(plan):
            if self.step <= before + steps or index == len(plan) - 1:
                return index + 1, len(plan), min(self.step - before, steps), steps
            before += steps
        return 1, 1, self.step, self.step
