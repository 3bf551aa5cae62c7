"""`python -m critic_train.worker`: one rank beside rank 0, started by it; shows and prints nothing.

The task is one line of JSON on standard input: {"command", "settings"}. The place among the ranks is in the
environment, as torchrun gives it. A fault is told to rank 0, which raises it.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from critic_train.events import Event
from critic_train.settings import EvalSettings, FitSettings
from critic_train.stopping import StopRequest

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(task: dict[str, Any], stop: StopRequest) -> Iterator[Event]:
    """The command's own generator."""
    command: Callable[[Any, StopRequest], Iterator[Event]]
    if task["command"] == "fit":
        from critic_train.training.fit import fit as command

        return command(FitSettings(**task["settings"]), stop)
    from critic_train.evaluation.evaluate import evaluate as command

    return command(EvalSettings(**task["settings"]), stop)


def stop_on_signals(stop: StopRequest) -> None:
    """The first signal asks, the second leaves at once; what rank 0 was told to ignore is ignored here as well."""

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            os._exit(128 + number)
        stop.signal_number = number

    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, ask)


def leave_with_rank_0() -> None:
    """Wait for the end of standard input in a thread; it comes when rank 0 has ended, however that was."""

    def wait() -> None:
        # Not through sys.stdin: a thread that waits in there keeps the interpreter from ending.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> int:
    """Do the task; returns 0, or 1 where it did not come to its end."""
    stop = StopRequest()
    stop_on_signals(stop)
    task = json.loads(sys.stdin.buffer.readline())
    leave_with_rank_0()
    for _ in run(task, stop):
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
