"""What all trackers do alike: open late, log steps and evaluations, close once."""

from abc import ABC, abstractmethod

from critic_train.events import EvaluationEnded, Event, StepEnded
from critic_train.observing.metric_names import evaluation_metrics, step_metrics


class Tracker(ABC):
    """An observer that logs numbers by step.

    Attributes:
        name: of the tracker, for what is told of it.
    """

    name: str

    def __init__(self) -> None:
        self._is_open = False

    def take(self, event: Event) -> None:
        """See Observer."""
        if isinstance(event, StepEnded):
            self._log(step_metrics(event), event.step)
        elif isinstance(event, EvaluationEnded):
            self._log(evaluation_metrics(event), event.step)

    def close(self) -> None:
        """See Observer."""
        if self._is_open:
            self._is_open = False
            self.close_run()

    @abstractmethod
    def open_run(self) -> None:
        """Start, or go on with, the tracker's run."""

    @abstractmethod
    def log(self, numbers: dict[str, float], step: int) -> None:
        """Hand the tracker some numbers of a step."""

    @abstractmethod
    def close_run(self) -> None:
        """Let the tracker write out what it holds."""

    def _log(self, numbers: dict[str, float], step: int) -> None:
        if not self._is_open:
            self.open_run()
            self._is_open = True
        self.log(numbers, step)
