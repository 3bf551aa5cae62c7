"""Two ways to show a job: nothing but its notices, or plain lines. The live view builds on them."""

import contextlib
import os
import sys
from types import TracebackType
from typing import Self

from critic_train.events import (
    CheckpointSaved,
    EvaluationEnded,
    Event,
    Notice,
    Progress,
    RunStarted,
    StepEnded,
)
from critic_train_cli.course import Course
from critic_train_cli.lines import (
    checkpoint_line,
    evaluation_line,
    progress_line,
    started_lines,
    step_line,
)
from critic_train_cli.output import Output

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
        self.course = Course()
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
