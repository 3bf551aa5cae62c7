"""Progress without a terminal: `View` shows notices only, `PlainView` one line an event, for log files."""

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

SECONDS_BETWEEN_STAGE_LINES = 10.0
SECONDS_BEFORE_NEW_STAGE_LINE = 2.0
"""After so long without a line, a stage that begins gets one: it may be what takes long."""


def started_lines(event: RunStarted) -> list[str]:
    """The run's directory and summary, in lines no wider than the terminal."""
    entries = [f"run: {event.out}"]
    entries += [
        f"{str(key).replace('_', ' ')}: {format_value(value)}"
        for key, value in event.summary.items()
        if value is not None
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


def format_value(value: Any) -> str:
    """A value of the summary as text: yes and no, thousands separated, lists and dicts inline."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return short(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {format_value(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(format_value(inner) for inner in value)
    return str(value)


def step_line(state: RunState) -> str:
    """The newest step in one line."""
    metrics, timing = state.metrics, state.timing
    epoch, epochs, _, _ = state.epoch
    total = state.run.total_steps if state.run else state.step
    parts = [
        f"step {state.step}/{total}",
        f"epoch {epoch}/{epochs}",
        f"loss {short(metrics.get('value_loss'))}",
        f"clipfrac {percent(metrics.get('clipfrac'))}",
        f"saturation {percent(metrics.get('saturation'))}",
        f"grad norm {short(metrics.get('grad_norm'))}",
        f"lr {short(metrics.get('lr'))}",
        throughput(timing),
        f"memory {format_bytes(timing.get('memory_bytes'))}",
        f"left {duration(state.left_seconds)}",
    ]
    return "  ".join(parts)


def throughput(timing: dict[str, Any]) -> str:
    """Rollout tokens per second, and tokens computed per second, which are fewer where prefixes are shared."""
    rollout = count(timing.get("rollout_tokens_per_second"))
    return f"{rollout} tokens/s ({count(timing.get('computed_tokens_per_second'))} computed)"


def evaluation_line(event: EvaluationEnded) -> str:
    """An evaluation on held-out rollouts in one line."""
    metrics = event.metrics
    figure = with_interval(metrics.get("explained_variance"), metrics.get("explained_variance_interval"))
    line = f"step {event.step} held out: explained variance {figure}"
    within = metrics.get("explained_variance_within_group")
    if number(within) is not None:
        line += f", within prompts {with_interval(within, None)}"
    return line + (", the best so far" if event.best else "")


def checkpoint_line(event: CheckpointSaved) -> str:
    """A checkpoint in one line."""
    return f"step {event.step} checkpoint: {event.path} ({format_bytes(event.size_bytes)})"


def progress_line(event: Progress) -> str:
    """The progress of a stage in one line."""
    if event.total <= 0:
        return f"{event.stage}: {event.done:,} {event.unit}" if event.done else event.stage
    part = f"{event.done:,}/{event.total:,} {event.unit}"
    return f"{event.stage}: {part} ({100 * event.done / event.total:.0f} %)"


class View:
    """Shows notices and nothing else; base of the other views.

    Args:
        output: where lines go.
        stopping: the message at the first signal: what happens now.
        before_first_step: the same while nothing that was done would be kept: before a run's first step since its
            start, and always in a job without steps. The process then ends at once, if it is alone. None for jobs that
            keep what they did.
        is_alone: whether this process is the only one of the job.

    Attributes:
        state: of the run, from the events so far.
        log_every: steps between plain lines.
    """

    def __init__(
        self, output: Output, *, stopping: str, before_first_step: str | None = None, is_alone: bool = True
    ) -> None:
        self.output = output
        self.state = RunState()
        self.log_every = 10
        self._is_alone = is_alone
        self._stopping, self._before_first_step = stopping, before_first_step

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, event: Event) -> None:
        """Show the next event."""
        self.state.update(event)
        if isinstance(event, Notice):
            self.output.notice(event.message, event.level)

    @property
    def leaves_at_once(self) -> bool:
        """Whether the first signal ends the process where it is: nothing that was done so far would be kept."""
        return self._is_alone and self._before_first_step is not None and not self.state.has_learned

    @property
    def stopping_message(self) -> str:
        """The message at the first signal, in full."""
        if self._before_first_step is None or self.state.has_learned:
            return f"{self._stopping} (again to leave at once)"
        return self._before_first_step + ("" if self._is_alone else " (again to leave at once)")

    def stopping(self) -> None:
        """Write the message of the first signal. Called in the signal handler, so it writes past Python's buffers."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.write(sys.stderr.fileno(), f"{self.stopping_message}\n".encode())

    def leaving(self) -> None:
        """Restore the terminal. Called in the handler of the second signal, just before the process exits."""


class PlainView(View):
    """One line an event, without control codes: for log files and pipes."""

    def __init__(
        self, output: Output, *, stopping: str, before_first_step: str | None = None, is_alone: bool = True
    ) -> None:
        super().__init__(output, stopping=stopping, before_first_step=before_first_step, is_alone=is_alone)
        self._line_at = 0.0
        self._stage = ""

    def show(self, event: Event) -> None:
        """Show the next event: write its lines, if any."""
        super().show(event)
        lines = self.lines_of(event)
        for line in lines:
            self.output.line(line)
        if lines or isinstance(event, Notice):
            self._line_at = self.state.seconds

    def lines_of(self, event: Event) -> list[str]:
        """The lines to write for an event."""
        if isinstance(event, RunStarted):
            return started_lines(event)
        if isinstance(event, StepEnded):
            return [step_line(self.state)] if self.is_due(event.step) else []
        if isinstance(event, EvaluationEnded):
            return [evaluation_line(event)]
        if isinstance(event, CheckpointSaved):
            return [checkpoint_line(event)]
        if isinstance(event, Progress):
            return self._stage_lines(event)
        return []

    def is_due(self, step: int) -> bool:
        """Whether a step gets a line: every --log-every steps, the first since start or resume, and the last."""
        run = self.state.run
        return step % self.log_every == 0 or (run is not None and step in (run.first_step + 1, run.total_steps))

    def _stage_lines(self, event: Progress) -> list[str]:
        begins, self._stage = event.stage != self._stage, event.stage
        least = SECONDS_BEFORE_NEW_STAGE_LINE if begins else SECONDS_BETWEEN_STAGE_LINES
        if self.state.stage is None or self.state.seconds - self._line_at < least:
            return []
        return [progress_line(event)]
