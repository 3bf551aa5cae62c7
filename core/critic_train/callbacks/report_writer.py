"""Keep a run's page up to date: the whole verdict beside the run at each evaluation, and the page that shows it."""

import time
from collections.abc import Callable
from pathlib import Path

from critic_train.events import EvaluationEnded, Event
from critic_train.jsonio import read_json_object_or_none
from critic_train.report.report_sources import EVALUATION, PAGE
from critic_train.run.storage import write_json

SHARE = 0.03
"""Of a run's time, what drawing pages may take before its end."""
FIRST_SECONDS = 1.0
"""What the first page is taken to cost; matplotlib is loaded for it."""


class ReportWriter:
    """Writes evaluation.json at each evaluation that is the best so far, and report.html as often as it may.

    The page at the end is always written, also of a run that was stopped or has failed.

    Args:
        run: the run's directory.
        clock: seconds.
    """

    name = PAGE

    def __init__(self, run: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._run = run
        self._clock = clock
        self._began = clock()
        self._spent = 0.0
        self._last = FIRST_SECONDS
        self._failed = False
        self._best_stands = _is_of_the_best(run / EVALUATION)

    def take(self, event: Event) -> None:
        """See Observer."""
        if not isinstance(event, EvaluationEnded) or self._failed:
            return
        if event.best or not self._best_stands:
            write_json(self._run / EVALUATION, {"step": event.step, "best": event.best, **event.verdict})
            self._best_stands = event.best
        if self._spent + self._last <= SHARE * (self._clock() - self._began):
            self._write()

    def close(self) -> None:
        """See Observer."""
        if not self._failed:
            self._write()

    def _write(self) -> None:
        from critic_train.report.page import write_page
        from critic_train.report.report_sources import read_run

        began = self._clock()
        self._failed = True  # until it is written: what fails once is not tried again
        write_page(self._run / PAGE, [read_run(self._run)])
        self._failed = False
        self._last = self._clock() - began
        self._spent += self._last


def _is_of_the_best(path: Path) -> bool:
    """Whether an evaluation from before a run was stopped is of the best critic until then."""
    return bool((read_json_object_or_none(path) or {}).get("best"))
