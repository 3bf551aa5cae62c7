"""Write evaluation.json and report.html while a run goes on."""

import time
from collections.abc import Callable
from pathlib import Path

from critic_train.events import EvaluationEnded, Event
from critic_train.jsonio import read_json_object_or_none
from critic_train.report.report_sources import EVALUATION, PAGE
from critic_train.run.storage import write_json

MAX_SHARE = 0.03
"""The share of a run's time that may be spent on its page before the end."""
FIRST_PAGE_SECONDS = 1.0
"""How long the first page is assumed to take; matplotlib is imported for it."""


class ReportWriter:
    """Writes evaluation.json at each evaluation that is the best so far, and report.html as often as MAX_SHARE allows.

    The page is always written at the end, also where the run was stopped or has failed.

    Args:
        run: the run directory.
        clock: seconds.
    """

    name = PAGE

    def __init__(self, run: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._run = run
        self._clock = clock
        self._began = clock()
        self._seconds_spent = 0.0
        self._seconds_of_last_page = FIRST_PAGE_SECONDS
        self._failed = False
        self._file_is_of_best = _is_of_best(run / EVALUATION)

    def on_event(self, event: Event) -> None:
        """See Callback."""
        if not isinstance(event, EvaluationEnded) or self._failed:
            return
        if event.best or not self._file_is_of_best:
            write_json(self._run / EVALUATION, {"step": event.step, "best": event.best, **event.verdict})
            self._file_is_of_best = event.best
        if self._seconds_spent + self._seconds_of_last_page <= MAX_SHARE * (self._clock() - self._began):
            self._write()

    def close(self) -> None:
        """See Callback."""
        if not self._failed:
            self._write()

    def _write(self) -> None:
        from critic_train.report.page import write_page
        from critic_train.report.report_sources import read_run

        began = self._clock()
        self._failed = True  # until it is written: a page that failed is not tried again
        write_page(self._run / PAGE, [read_run(self._run)])
        self._failed = False
        self._seconds_of_last_page = self._clock() - began
        self._seconds_spent += self._seconds_of_last_page


def _is_of_best(path: Path) -> bool:
    """Whether an evaluation.json that the run wrote before it was resumed is of its best critic."""
    return bool((read_json_object_or_none(path) or {}).get("best"))
