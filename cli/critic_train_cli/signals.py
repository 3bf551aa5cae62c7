"""SIGINT, SIGTERM and SIGHUP ask a job to stop; a second one leaves at once."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from critic_train.stopping import StopRequest
from critic_train_cli.exit_codes import INTERRUPTED

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HANDED_ON_SECONDS = 5.0
"""Slurm signals a whole job and torchrun hands on what it got: one signal, which a rank then gets twice."""


@contextmanager
def stop_on_signals(stop: StopRequest, tell: Callable[[], None], leave: Callable[[], None]) -> Iterator[None]:
    """While a job runs, turn the first signal into a request and the second into an exit.

    A signal that is ignored at the start stays ignored: a shell without job control starts `command &` with
    SIGINT ignored, nohup does so with SIGHUP, and both mean it. A closed pipe is ignored as well, so that a
    log's reader who goes away does not end hours of training; the old handlers come back at the end.

    Args:
        stop: where the request is left for the job.
        tell: called at the first signal, from within the handler: it must not take locks.
        leave: called at the second, likewise, just before the program is gone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    launched = os.environ.get("WORLD_SIZE", "1") != "1"
    first = -HANDED_ON_SECONDS

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now, before = time.monotonic(), first
        if not stop.requested:
            first = now
        elif launched and now - before < HANDED_ON_SECONDS:
            return
        else:
            leave()
            os._exit(INTERRUPTED + number)
        stop.signal_number = number
        tell()

    before: dict[signal.Signals, Any] = {}
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, ask)
    before[signal.SIGPIPE] = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: a handler that C code installed, which Python can neither name nor bring back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def exit_on_closed_pipe() -> None:
    """Outside of a job a closed pipe ends the program as it ends any Unix tool (the shell says 141)."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
