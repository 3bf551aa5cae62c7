"""Run a job of the library: its events go to a view, signals to its stop request, its end to an exit code."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from critic_train.errors import ConfigError
from critic_train.events import Event, RunEnded, RunStarted
from critic_train.stopping import StopRequest
from critic_train_cli.exit_codes import DONE, INTERRUPTED, REFUSED
from critic_train_cli.output import Output
from critic_train_cli.plain_view import PlainView, View
from critic_train_cli.signals import StoppedAtOnce, stop_on_signals
from critic_train_cli.terminal import can_redraw

if TYPE_CHECKING:
    from rich.console import Console

VARIABLE = "CRITIC_TRAIN_PROGRESS"


def choose_view(output: Output, *, stopping: str, before_first_step: str | None = None, nproc: int = 1) -> View:
    """Choose how progress is shown: live on a terminal, in plain lines elsewhere, unless CRITIC_TRAIN_PROGRESS is set.

    Args:
        output: where the view writes.
        stopping, before_first_step: see View.
        nproc: processes that this one starts, itself included.

    Raises:
        ConfigError: the variable has another value than live, plain or 0.
    """
    form = os.environ.get(VARIABLE, "").lower()
    if form not in ("", "0", "plain", "live"):
        raise ConfigError(f"{VARIABLE} must be live, plain or 0, not {form!r}")
    kind: type[View] = PlainView
    if output.quiet or output.silent or form == "0":
        kind = View
    elif form == "live" or (not form and can_redraw(sys.stderr)):
        from critic_train_cli.live import LiveView

        kind = LiveView
    is_alone = nproc == 1 and os.environ.get("WORLD_SIZE", "1") == "1"
    return kind(output, stopping=stopping, before_first_step=before_first_step, is_alone=is_alone)


def run_job(start: Callable[[StopRequest], Iterator[Event]], view: View, output: Output) -> RunEnded:
    """Run a job to its last event.

    Args:
        start: returns the job's events. It is called when the view is shown, so heavy imports belong into it.
        view: draws the events.
        output: is given the run directory, for a crash log.

    Raises:
        RuntimeError: the job yielded no RunEnded event, which is a bug.
    """
    stop = StopRequest()
    ended: RunEnded | None = None
    signals = stop_on_signals(stop, view.stopping, view.leaving, lambda: view.leaves_at_once)
    try:
        with signals, view, closing(start(stop)) as events:  # type: ignore[type-var]
            for event in events:
                if isinstance(event, RunStarted):
                    output.run_directory = event.out
                view.show(event)
                if isinstance(event, RunEnded):
                    ended = event
    except StoppedAtOnce:
        ended = ended or RunEnded(status="interrupted", signal_number=stop.signal_number)
    if ended is None:
        raise RuntimeError("the job ended without a RunEnded event")
    if ended.status == "interrupted" and ended.signal_number is None:
        number = stop.signal_number or signal.SIGINT
        return RunEnded(status=ended.status, result=ended.result, signal_number=number)
    return ended


def exit_code_of(ended: RunEnded) -> int:
    """0, or 128 + the number of the signal that stopped the job."""
    if ended.status == "interrupted":
        return INTERRUPTED + (ended.signal_number or signal.SIGINT)
    return DONE


def run_inspection(
    start: Callable[[StopRequest], Iterator[Event]], draw: Callable[["Console", dict[str, Any]], None], output: Output
) -> int:
    """Run a job that only reads, print its result, and return the exit code: 1 where the result is not "sound".

    Args:
        start: see `run_job`.
        draw: draws the result on the console; with --json it is printed as it is.
        output: where the result goes.
    """
    ended = run_job(start, choose_view(output, stopping="stopping", before_first_step="stopping"), output)
    if ended.status != "finished":
        output.result({"status": ended.status}, lambda console: None)
        return exit_code_of(ended)
    output.result(ended.result, lambda console: draw(console, ended.result))
    return DONE if ended.result["sound"] else REFUSED
