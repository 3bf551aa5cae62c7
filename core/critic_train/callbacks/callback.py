"""Pass a run's events to callbacks, which log or draw them and cannot end the run; and the report's callback."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from critic_train.errors import first_line
from critic_train.events import EvaluationEnded, Event, Notice
from critic_train.jsonio import read_json_object_or_none
from critic_train.report.report_sources import EVALUATION, PAGE
from critic_train.run.storage import write_json


class Callback(Protocol):
    """Is given every event of a run, in order.

    Attributes:
        name: what a warning calls it, as in "wandb".
    """

    name: str

    def on_event(self, event: Event) -> None:
        """Handle the next event. An exception ends this callback, never the run."""

    def close(self) -> None:
        """The run is over, was stopped, or has failed. Called once, also after `on_event` has raised."""


def with_callbacks(events: Iterator[Event], callbacks: Sequence[Callback]) -> Iterator[Event]:
    """Yield a run's events, each after the callbacks were given it.

    A callback that raises is closed and given nothing more; a warning says so.

    Args:
        events: of a run.
        callbacks: called in this order.
    """
    active = list(callbacks)
    try:
        for event in events:
            for callback in list(active):
                warning = _call(callback, lambda callback=callback, event=event: callback.on_event(event))  # type: ignore[misc]
                if warning is not None:
                    active.remove(callback)
                    _call(callback, callback.close)
                    yield warning
            yield event
    finally:
        warnings = [_call(callback, callback.close) for callback in active]
    yield from (warning for warning in warnings if warning is not None)


def _call(callback: Callback, method: Callable[[], None]) -> Notice | None:
    """Call a method of a callback; a warning where it raises."""
    try:
        method()
    except Exception as error:
        reason = first_line(error)
        return Notice(
            message=f"{callback.name} failed and gets nothing more of this run: {reason}; metrics.jsonl has everything",
            level="warning",
        )
    return None


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
