"""Events in plain words: what a log file gets, line by line.

Two ways to show a job: nothing but its notices, or plain lines. The live view builds on them.
"""

import contextlib
import os
import sys
from types import TracebackType
from typing import Any, Self

from critic_train.events import CheckpointSaved, EvaluationEnded, Event, Notice, Progress, RunStarted, StepEnded
from critic_train.text import DASH, count, duration, format_bytes, number, percent, short, with_interval
from critic_train_cli.output import Output
from critic_train_cli.run_state import RunState
from critic_train_cli.terminal import width_of


def started_lines(event: RunStarted) -> list[str]:
    """The run's directory and summary: as many entries to a line as fit."""
    entries = [f"run: {event.out}"]
    entries += [
        f"{str(key).replace('_', ' ')}: {told(value)}" for key, value in event.summary.items() if value is not None
    ]
    lines: list[str] = []
    for entry in entries:
        if lines and len(lines[-1]) + 3 + len(entry) <= width_of(sys.stderr):
            lines[-1] += "   " + entry
        else:
            lines.append(entry)
    if event.first_step:
        lines.append(f"going on after step {event.first_step} of {event.total_steps}")
    return lines


def told(value: Any) -> str:
    """A value of the summary as a person reads it."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return short(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {told(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(told(inner) for inner in value)
    return str(value)


def step_line(course: RunState) -> str:
    """The newest step, in one line."""
    metrics, timing = course.metrics, course.timing
    epoch, epochs, _, _ = course.epoch
    total = course.run.total_steps if course.run else course.step
    parts = [
        f"step {course.step}/{total}",
        f"epoch {epoch}/{epochs}",
        f"loss {short(metrics.get('value_loss'))}",
        f"clipfrac {percent(metrics.get('clipfrac'))}",
        f"saturation {percent(metrics.get('saturation'))}",
        f"grad norm {short(metrics.get('grad_norm'))}",
        f"lr {short(metrics.get('lr'))}",
        speed(timing),
        f"memory {format_bytes(timing.get('memory_bytes'))}",
        f"left {duration(course.left_seconds)}",
    ]
    return "  ".join(parts)


def speed(timing: dict[str, Any]) -> str:
    """Rollout tokens per second and, beside them, those computed: sharing shows as the difference."""
    rollout = count(timing.get("rollout_tokens_per_second"))
    return f"{rollout} tokens/s ({count(timing.get('computed_tokens_per_second'))} computed)"


def evaluation_line(event: EvaluationEnded) -> str:
    """How the critic did on held-out rollouts."""
    metrics = event.metrics
    figure = with_interval(metrics.get("explained_variance"), metrics.get("explained_variance_interval"))
    words = f"step {event.step} held out: explained variance {figure}"
    within = metrics.get("explained_variance_within_group")
    if number(within) is not None:
        words += f", within prompts {with_interval(within, None)}"
    return words + (", the best so far" if event.best else "")


def checkpoint_line(event: CheckpointSaved) -> str:
    """Where the checkpoint stands."""
    return f"step {event.step} checkpoint: {event.path} ({format_bytes(event.size_bytes)})"


def progress_line(event: Progress) -> str:
    """How far a stage is."""
    if event.total <= 0:
        return f"{event.stage}: {event.done:,} {event.unit}" if event.done else event.stage
    part = f"{event.done:,}/{event.total:,} {event.unit}"
    return f"{event.stage}: {part} ({100 * event.done / event.total:.0f} %)"


SECONDS_BETWEEN_STAGE_LINES = 10.0


class View:
    """Shows nothing but notices; the other views build on it.

    Attributes:
        course: what the run has said so far.
        log_every: steps between plain lines.
        stopping_words: what is said at the first signal.
    """

    def __init__(self, output: Output, *, stopping: str) -> None:
        self.output = output
        self.course = RunState()
        self.log_every = 10
        self.stopping_words = f"{stopping} (again to leave at once)"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, event: Event) -> None:
        """Take the next event in."""
        self.course.take(event)
        if isinstance(event, Notice):
            self.output.notice(event.message, event.level)

    def stopping(self) -> None:
        """Say that a signal was heard. Runs in the signal handler, so it goes around Python's buffers."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.write(sys.stderr.fileno(), f"{self.stopping_words}\n".encode())

    def leaving(self) -> None:
        """The program is about to be gone, at a second signal: put the terminal back in order."""


class PlainView(View):
    """A line for each thing worth one: fit for a log file, no control codes."""

    def __init__(self, output: Output, *, stopping: str) -> None:
        super().__init__(output, stopping=stopping)
        self._stage_line_at = 0.0

    def show(self, event: Event) -> None:
        """Take the next event in, and write its line if it has one now."""
        super().show(event)
        for line in self.lines_of(event):
            self.output.line(line)

    def lines_of(self, event: Event) -> list[str]:
        """The lines that an event is worth now."""
        if isinstance(event, RunStarted):
            return started_lines(event)
        if isinstance(event, StepEnded):
            return [step_line(self.course)] if self.is_due(event.step) else []
        if isinstance(event, EvaluationEnded):
            return [evaluation_line(event)]
        if isinstance(event, CheckpointSaved):
            return [checkpoint_line(event)]
        if isinstance(event, Progress):
            return self._stage_lines(event)
        return []

    def is_due(self, step: int) -> bool:
        """Whether a step has its line: each --log-every, and the session's first and the run's last."""
        run = self.course.run
        return step % self.log_every == 0 or (run is not None and step in (run.first_step + 1, run.total_steps))

    def _stage_lines(self, event: Progress) -> list[str]:
        seconds = self.course.stage_seconds
        if seconds < self._stage_line_at:
            self._stage_line_at = 0.0  # another stage has begun since
        if self.course.stage is None or seconds - self._stage_line_at < SECONDS_BETWEEN_STAGE_LINES:
            return []
        self._stage_line_at = seconds
        return [progress_line(event)]
