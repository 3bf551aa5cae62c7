"""Events in plain words: what a log file gets, line by line."""

import sys
from typing import Any

from critic_train.events import CheckpointSaved, EvaluationEnded, Progress, RunStarted
from critic_train.figures import DASH, count, duration, number, share, short, size, with_interval
from critic_train_cli.course import Course
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


def step_line(course: Course) -> str:
    """The newest step, in one line."""
    metrics, timing = course.metrics, course.timing
    epoch, epochs, _, _ = course.epoch
    total = course.run.total_steps if course.run else course.step
    parts = [
        f"step {course.step}/{total}",
        f"epoch {epoch}/{epochs}",
        f"loss {short(metrics.get('value_loss'))}",
        f"clipfrac {share(metrics.get('clipfrac'))}",
        f"saturation {share(metrics.get('saturation'))}",
        f"grad norm {short(metrics.get('grad_norm'))}",
        f"lr {short(metrics.get('lr'))}",
        speed(timing),
        f"memory {size(timing.get('memory_bytes'))}",
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
    return f"step {event.step} checkpoint: {event.path} ({size(event.size_bytes)})"


def progress_line(event: Progress) -> str:
    """How far a stage is."""
    if event.total <= 0:
        return f"{event.stage}: {event.done:,} {event.unit}" if event.done else event.stage
    part = f"{event.done:,}/{event.total:,} {event.unit}"
    return f"{event.stage}: {part} ({100 * event.done / event.total:.0f} %)"
