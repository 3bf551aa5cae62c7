"""The events that a job yields while it runs: the command line draws them, callbacks log them.

Nothing heavy is imported here. `metrics` dictionaries hold plain numbers, or None where a metric does not exist, under
the names of `metrics.jsonl`.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """A message for the user: a value head was created, a fallback was taken, rows were left out.

    `level` is "info" or "warning".
    """

    message: str
    level: str = "info"


EVALUATING, SOLVING_HEAD = "evaluating", "solving the value head"
"""Stages of a run that a view has to know by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Progress of a stage other than training: "reading rollouts", "evaluating", "old values"."""

    stage: str
    done: int
    total: int
    unit: str = "rollouts"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """Data, model and plan are resolved, and the first step is next.

    `summary` describes them in plain values, in display order.
    `first_step` is 0, or the step from which the run resumes.
    """

    out: str
    total_steps: int
    steps_per_epoch: list[int]
    first_step: int
    summary: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEnded:
    """One optimizer step was taken.

    `metrics` goes to metrics.jsonl and is reproducible; `timing` (seconds, tokens per second, memory) is not.
    `skipped_steps` is how many steps were skipped so far; None without `--on-non-finite skip`.
    """

    step: int
    epoch: int
    metrics: dict[str, Any]
    timing: dict[str, Any]
    skipped_steps: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationEnded:
    """The critic was evaluated on held-out rollouts; `best` says whether it is the best so far.

    `metrics` goes to metrics.jsonl; `verdict` is the evaluation in the form of eval's result, with its example
    rollouts.
    """

    step: int
    metrics: dict[str, Any]
    best: bool
    verdict: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved:
    """A complete checkpoint was written to `path`; `size_bytes` is its size on disk."""

    step: int
    path: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded:
    """The run is over: `status` is "finished", "already finished" or "interrupted".

    `signal_number` is set when interrupted. `result` is what `--json` prints.
    """

    status: str
    result: dict[str, Any] = field(default_factory=dict)
    signal_number: int | None = None


Event = Notice | Progress | RunStarted | StepEnded | EvaluationEnded | CheckpointSaved | RunEnded


def run_to_end(events: Iterable[Event]) -> RunEnded:
    """Run a job to its end without looking at its progress: `run_to_end(fit(settings)).result`.

    Notices of level "warning" become Python warnings.

    Args:
        events: what `fit`, `evaluate`, `predict`, `check`, `convert`, `split` or `verify` returned.

    Raises:
        CriticTrainError: whatever the job raises.
    """
    ended: RunEnded | None = None
    for event in events:
        if isinstance(event, Notice) and event.level == "warning":
            warnings.warn(event.message, stacklevel=2)
        elif isinstance(event, RunEnded):
            ended = event
    if ended is None:
        raise RuntimeError("the job ended without a RunEnded event")
    return ended
