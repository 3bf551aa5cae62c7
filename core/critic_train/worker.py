"""`python -m critic_train.worker`: one rank beside rank 0, which starts it; it prints nothing.

Its task is one line of JSON on standard input: {"command", "settings"}. Its rank is in the environment, as torchrun
gives it. An error is sent to rank 0, which raises it.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from critic_train.events import Event
from critic_train.settings import EvalSettings, FitSettings
from critic_train.stopping import StopRequest

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(task: dict[str, Any], stop: StopRequest) -> Iterator[Event]:
    """The events of the command that the task names."""
    if task["command"] == "fit":
        from critic_train.training.fit import fit

        return fit(FitSettings(**task["settings"]), stop)
    from critic_train.evaluation.evaluate import evaluate

    return evaluate(EvalSettings(**task["settings"]), stop)


def stop_on_signals(stop: StopRequest) -> None:
    """The first signal requests a stop, the second ends the process; signals that rank 0 ignores are ignored."""

    def request_stop(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            os._exit(128 + number)
        stop.signal_number = number

    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, request_stop)


def exit_with_rank_0() -> None:
    """End this process when standard input ends, which is when rank 0 has ended, however that was."""

    def wait_for_end() -> None:
        # Not through sys.stdin: a thread that waits in there keeps the interpreter from ending.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()


def main() -> int:
    """Run the task; returns the exit code 0, or raises."""
    stop = StopRequest()
    stop_on_signals(stop)
    task = json.loads(sys.stdin.buffer.readline())
    exit_with_rank_0()
    for _ in run(task, stop):
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
