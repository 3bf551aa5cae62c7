"""Run a long job: its events go to a view, its signals to a stop request, its end to an exit code."""

import signal
from collections.abc import Callable, Iterator
from contextlib import closing

from critic_train.events import Event, RunEnded, RunStarted
from critic_train.stopping import StopRequest
from critic_train_cli.faults import DONE, INTERRUPTED
from critic_train_cli.output import Output
from critic_train_cli.signals import stop_on_signals
from critic_train_cli.views import View


def run_job(start: Callable[[StopRequest], Iterator[Event]], view: View, output: Output) -> RunEnded:
    """Follow a job to its last event.

    Args:
        start: begins the job and yields its events; whatever is heavy is imported in here, under the view.
        view: draws the events.
        output: learns of the run directory, for a crash log.

    Raises:
        RuntimeError: the job ended without saying so; that is a bug.
    """
    stop = StopRequest()
    ended: RunEnded | None = None
    with stop_on_signals(stop, view.stopping, view.leaving), view, closing(start(stop)) as events:  # type: ignore[type-var]
        for event in events:
            if isinstance(event, RunStarted):
                output.run_directory = event.out
            view.show(event)
            if isinstance(event, RunEnded):
                ended = event
    if ended is None:
        raise RuntimeError("the job ended without a RunEnded event")
    if ended.status == "interrupted" and ended.signal_number is None:
        number = stop.signal_number or signal.SIGINT
        return RunEnded(status=ended.status, result=ended.result, signal_number=number)
    return ended


def exit_code_of(ended: RunEnded) -> int:
    """0, or 128 and the number of the signal that stopped the job."""
    if ended.status == "interrupted":
        return INTERRUPTED + (ended.signal_number or signal.SIGINT)
    return DONE
