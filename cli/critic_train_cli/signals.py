"""SIGINT, SIGTERM and SIGHUP ask a job to stop; the second signal ends the process at once."""

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

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FORWARDED_SECONDS = 5.0
"""Slurm signals every process of a job and torchrun forwards the signal: within this time a rank gets one twice."""


class StoppedAtOnce(KeyboardInterrupt):
    """Raised in the main thread, wherever it is, by a first signal that need not be waited for.

    It is a KeyboardInterrupt so that no handler of errors takes it for one.
    """


@contextmanager
def stop_on_signals(
    stop: StopRequest,
    on_stop: Callable[[], None],
    on_exit: Callable[[], None],
    leaves_at_once: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """While a job runs, the first signal requests a stop and the second exits the process.

    A signal that is ignored at the start stays ignored: a shell without job control starts `command &` with SIGINT
    ignored, and nohup ignores SIGHUP. SIGPIPE is ignored too, so that a closed log does not end hours of training.
    The previous handlers are restored at the end.

    Args:
        stop: set by the first signal, read by the job.
        on_stop: called at the first signal, inside the handler: it must not take locks.
        on_exit: called at the second, likewise, just before the process exits.
        leaves_at_once: called at the first: whether to raise StoppedAtOnce, as nothing that was done would be kept.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    is_launched = os.environ.get("WORLD_SIZE", "1") != "1"
    first_signal_at = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first_signal_at
        if not stop.requested:
            first_signal_at = time.monotonic()
            stop.signal_number = number
            leaves = leaves_at_once()
            on_stop()
            if leaves:
                raise StoppedAtOnce
        elif not is_launched or time.monotonic() - first_signal_at >= FORWARDED_SECONDS:
            on_exit()
            os._exit(INTERRUPTED + number)

    previous: dict[signal.Signals, Any] = {}
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, handle)
    previous[signal.SIGPIPE] = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in previous.items():
            # None is a handler that C code installed, which Python cannot restore.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def exit_on_closed_pipe() -> None:
    """Outside a job, let a closed pipe end the process as it ends any Unix tool (exit code 141 in the shell)."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
