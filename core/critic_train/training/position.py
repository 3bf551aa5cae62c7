"""Where a run stands."""

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, kw_only=True)
class Position:
    """Where a run stands; all that a checkpoint needs to remember besides weights and moments.

    No random state is kept because none is used: the order of the rollouts is a function of (seed, epoch), dropout
    is off, and initial weights are drawn once from the seed.

    Attributes:
        step: optimizer steps taken.
        evaluated_step: the step of the last evaluation, -1 before the first.
        best_step: the step with the best held-out figure (`--best-by`) so far, None while there is none.
        best_figure: that figure.
        evaluations_since_best: evaluations after it; after step 0 while there is none.
        metrics_bytes: length of metrics.jsonl at the checkpoint.
        skips: steps left out so far because their loss or gradient was not finite.
    """

    step: int = 0
    evaluated_step: int = -1
    best_step: int | None = None
    best_figure: float | None = None
    evaluations_since_best: int = 0
    metrics_bytes: int = 0
    skips: int = 0

    @classmethod
    def of(cls, record: dict[str, Any], total_steps: int) -> "Position":
        """The position that a checkpoint recorded. Raises TypeError or ValueError where it is none."""
        position = cls(**record)
        counts = (position.step, position.metrics_bytes, position.skips, position.evaluations_since_best)
        if not all(type(count) is int and count >= 0 for count in counts) or type(position.evaluated_step) is not int:
            raise ValueError("a count that is no whole number")
        if position.step > total_steps:
            raise ValueError(f"step {position.step} of a run of {total_steps}")
        if not isinstance(position.best_step, int | None) or not isinstance(position.best_figure, float | int | None):
            raise ValueError("a best step or figure that is no number")
        return position
